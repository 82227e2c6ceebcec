"""Reads off a model what its attention needs, by running its forward over a step that computes nothing."""

import torch
from torch import Tensor

from serve_app.attention.backend import AttentionShape
from serve_app.layers.step import Activation, AngleTable, MixtureWeights, NormWeights, Routing, Rows
from serve_app.quant.planar_weight import grouped_matrix
from serve_app.quant.weight import Weight

_ROWS = object()


class ShapeProbe:
    """See Step. After a model's forward: shapes of its attention layers, the dtype of its activations, its rotary
    tables, and whether there are experts that a GPU multiplies one by one, for which the host waits to know them."""

    def __init__(self) -> None:
        self.shapes: list[AttentionShape] = []
        self.dtype = torch.float32
        self.rotaries: list[AngleTable] = []
        self.has_single_experts = False

    def embed(self, weight: Weight, factor: float = 1.0) -> Rows:
        """See Step."""
        self.dtype = weight.dtype
        return _ROWS

    def linear(self, x: Rows, weight: Weight, bias: Tensor | None) -> Rows:
        """See Step."""
        return _ROWS

    def norm(self, x: Rows, weights: NormWeights) -> Rows:
        """See Step."""
        return _ROWS

    def add_norm(self, x: Rows, residual: Rows, weights: NormWeights) -> Rows:
        """See Step."""
        return _ROWS

    def head_norm(self, qkv: Rows, first: int, count: int, weights: NormWeights) -> None:
        """See Step."""

    def activate(self, x: Rows, activation: Activation) -> Rows:
        """See Step."""
        return _ROWS

    def gate(self, gate_up: Rows, activation: Activation) -> Rows:
        """See Step."""
        return _ROWS

    def experts(self, x: Rows, weights: MixtureWeights, routing: Routing, activation: Activation) -> Rows:
        """See Step."""
        parts = (weights.gate, weights.up, weights.down)
        self.has_single_experts |= any(grouped_matrix(part) is None for part in parts)
        return _ROWS

    def add_gated(self, x: Rows, other: Rows, gate: Rows) -> None:
        """See Step."""

    def attention(self, qkv: Rows, shape: AttentionShape, rotary: AngleTable | None) -> Rows:
        """See Step."""
        self.shapes.append(shape)
        if rotary is not None and rotary not in self.rotaries:
            self.rotaries.append(rotary)
        return _ROWS

    def add(self, x: Rows, other: Rows) -> None:
        """See Step."""

    def scale(self, x: Rows, factor: float) -> None:
        """See Step."""

    def softcap(self, x: Rows, cap: float) -> None:
        """See Step."""

    def wanted(self, x: Rows) -> Rows:
        """See Step."""
        return _ROWS
