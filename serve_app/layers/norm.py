"""Normalisation layers."""

import torch
from torch import Tensor

from serve_app.layers.step import NormWeights, Rows, Step


class Norm:
    """An RMS norm (Zhang and Sennrich 2019) or, with is_layer_norm, a layer norm (Ba et al. 2016)."""

    def __init__(
        self,
        weight: Tensor,
        epsilon: float,
        bias: Tensor | None = None,
        *,
        offset: float = 0.0,
        is_layer_norm: bool = False,
    ) -> None:
        """See NormWeights."""
        self._weights = NormWeights(weight, epsilon, bias, offset, is_layer_norm)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weights.weight.device

    def __call__(self, x: Rows, step: Step) -> Rows:
        """x [T, H] → [T, H]."""
        return step.norm(x, self._weights)

    def add(self, x: Rows, residual: Rows, step: Step) -> Rows:
        """Adds x to residual in place and returns the sum normalised: one pass over memory instead of two."""
        return step.add_norm(x, residual, self._weights)
