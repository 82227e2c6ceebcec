"""Normalisation layers."""

from torch import Tensor

from serve_app.layers.layer_ops import LayerOps


class RMSNorm:
    """x / rms(x) * weight. Source: Zhang and Sennrich 2019."""

    def __init__(self, weight: Tensor, epsilon: float, ops: LayerOps) -> None:
        """weight [H] float32."""
        self.weight = weight
        self.epsilon = epsilon
        self._ops = ops

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, H]."""
        return self._ops.rms_norm(x, self.weight, self.epsilon)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds x to residual in place and returns the sum normalised: one pass over memory instead of two."""
        return self._ops.add_rms_norm(x, residual, self.weight, self.epsilon)
