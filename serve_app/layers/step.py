"""What layers compute with: one object that stands for the step, in place of a library of operations.

A family's code is written once against `Step`. Plain torch carries it out at once (torch_step.py); on the CPU it is run
a single time over symbolic rows, and what it did becomes a native program (native_step.py).
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from serve_app.attention.backend import AttentionShape
from serve_app.layers.angle_sets import AngleSets
from serve_app.quant.experts import Experts
from serve_app.quant.weight import Weight

Rows: TypeAlias = Any
"""A row of numbers for each token: a Tensor [T, width], or what stands for it while a program is recorded."""

Activation = Literal["silu", "gelu_tanh", "gelu_erf"]


RoutingKind = Literal["softmax", "sparsemixer"]


@dataclass(frozen=True, slots=True)
class Routing:
    """How top_k experts and their factors come from a token's router logits.

    softmax: the largest probabilities over all experts; is_renormalised: divided by the sum of those taken.
    sparsemixer: two experts, each with its probability among those within 2 * jitter of it, relative to its size; for
    the second the first is left out. Source: Liu et al. 2024, "GRIN: GRadient-INformed MoE", section 2, at inference.
    """

    top_k: int
    kind: RoutingKind = "softmax"
    is_renormalised: bool = False
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    """router [experts, hidden] float32; gate and up [experts, inner, hidden]; down [experts, hidden, inner]."""

    router: Weight
    gate: Experts
    up: Experts
    down: Experts


@dataclass(frozen=True, slots=True)
class NormWeights:
    """x / rms(x) * (weight + offset), or with is_layer_norm (x - mean) / deviation * (weight + offset) + bias.

    weight and bias [H] float32. offset 1 is for weights that are kept as differences from 1 (Gemma).
    """

    weight: Tensor
    epsilon: float
    bias: Tensor | None = None
    offset: float = 0.0
    is_layer_norm: bool = False


class AngleTable(Protocol):
    """Where a layer's rotation comes from; see layers.rotary."""

    @property
    def rotary_dim(self) -> int:
        """Rotated elements of a head, the first ones."""
        ...

    @property
    def rows_ahead(self) -> int:
        """Rows of other sets in front of the one whose requests are the longest."""
        ...

    @property
    def sets(self) -> AngleSets:
        """Where in the table the positions of a request begin."""
        ...

    def covering(self, num_positions: int) -> NDArray[np.float32]:
        """[at least rows_ahead + num_positions, rotary_dim], contiguous: cosines of the first half, sines in the
        second. What requests of so many tokens need.

        The same array until more positions are asked for.
        """
        ...

    def on_device(self, num_positions: int) -> Tensor:
        """The same as a tensor on the model's device."""
        ...

    def num_bytes(self, num_positions: int) -> int:
        """Of that tensor, while requests have no more tokens."""
        ...


class Step(Protocol):
    """The operations of a step. Rows come in and go out in the compute dtype; each result is new unless it says so."""

    def embed(self, weight: Weight, factor: float = 1.0) -> Rows:
        """Rows of the embedding for the step's token ids, times a factor."""
        ...

    def linear(self, x: Rows, weight: Weight, bias: Tensor | None) -> Rows:
        """x W^T + b; bias [out] float32."""
        ...

    def norm(self, x: Rows, weights: NormWeights) -> Rows:
        """x normalised."""
        ...

    def add_norm(self, x: Rows, residual: Rows, weights: NormWeights) -> Rows:
        """Adds x to residual in place, and returns the sum normalised."""
        ...

    def head_norm(self, qkv: Rows, first: int, count: int, weights: NormWeights) -> None:
        """RMS norm, in place, of each of the heads [first, first + count) of rows of heads as wide as the weights."""
        ...

    def activate(self, x: Rows, activation: Activation) -> Rows:
        """f(x)."""
        ...

    def gate(self, gate_up: Rows, activation: Activation) -> Rows:
        """f(gate) * up, where gate is the left half of each row and up the right one."""
        ...

    def experts(self, x: Rows, weights: MixtureWeights, routing: Routing, activation: Activation) -> Rows:
        """The sum over the experts that each token takes of factor * down(f(gate(x)) * up(x)), by ascending expert."""
        ...

    def add_gated(self, x: Rows, other: Rows, gate: Rows) -> None:
        """Adds other * sigmoid(gate) to x in place; gate has rows of one number."""
        ...

    def attention(self, qkv: Rows, shape: AttentionShape, rotary: AngleTable | None) -> Rows:
        """Rotates queries and keys, appends keys and values to the cache, and attends over each request's context.

        qkv: queries, keys, values in this order, in heads; it is used up. Returns rows of n_heads * head_dim.
        """
        ...

    def add(self, x: Rows, other: Rows) -> None:
        """Adds other to x in place."""
        ...

    def scale(self, x: Rows, factor: float) -> None:
        """Multiplies in place."""
        ...

    def softcap(self, x: Rows, cap: float) -> None:
        """x = cap * tanh(x / cap), in place."""
        ...

    def wanted(self, x: Rows) -> Rows:
        """The rows of the tokens whose logits are wanted, [L, width]; once a step, after the last attention."""
        ...
