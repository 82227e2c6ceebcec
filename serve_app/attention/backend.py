"""What a step that is no native program asks of an attention backend, and what a model asks when one is chosen."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from serve_app.attention.device_batch import DeviceBatch


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Self-attention of one layer. Query head h reads KV head h // (n_heads // n_kv_heads).

    scale: of the scores. softcap: scores become softcap * tanh(score / softcap), 0 = they stay. window: keys that a
    query sees, itself included, 0 = all.
    """

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    softcap: float = 0.0
    window: int = 0


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What a model on a device asks of a backend.

    architecture: the CUDA device's compute capability, None elsewhere. dtype: of queries; kv_dtype: of the cache
    (uint8: q8 rows). block_size: tokens of a block. shapes: of all layers. wants_graphs: steps are to be captured in
    CUDA graphs, so that nothing in run() may depend on the host or wait for it.
    """

    device: torch.device
    architecture: tuple[int, int] | None
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    shapes: tuple[AttentionShape, ...]
    wants_graphs: bool = False

    @property
    def head_dims(self) -> set[int]:
        """Of all layers."""
        return {shape.head_dim for shape in self.shapes}

    @property
    def is_fp8(self) -> bool:
        """Whether keys and values are kept in e4m3."""
        return self.kv_dtype == torch.float8_e4m3fn


class PlannedAttention(Protocol):
    """One step's attention: what plan() prepared, used by every layer."""

    def run(self, shape: AttentionShape, q: Tensor) -> Tensor:
        """Attends causally over each request's whole context; the step's own keys and values are in their slots.

        q [T, n_heads, head_dim], rotated, unit stride in the last dimension. Returns [T, n_heads * head_dim] in q's
        dtype.
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute paged attention; holds no state between steps but scratch memory."""

    @property
    def name(self) -> str: ...

    @property
    def is_graph_safe(self) -> bool:
        """Whether a planned step can be captured in a CUDA graph, and replayed with other contents of its arrays."""
        ...

    def plan(self, batch: DeviceBatch) -> PlannedAttention:
        """Prepares the step once for all layers."""
        ...
