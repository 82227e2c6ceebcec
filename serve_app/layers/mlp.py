"""Feed-forward layers."""

from torch import Tensor

from serve_app.batch import ForwardBatch
from serve_app.layers.layer_ops import LayerOps
from serve_app.layers.linear import Linear


class GatedMLP:
    """down(silu(gate(x)) * up(x)). Source: Shazeer 2020, SwiGLU."""

    def __init__(self, gate_up: Linear, down: Linear, ops: LayerOps) -> None:
        """gate_up: hidden → 2 * intermediate: gate, then up."""
        self._gate_up = gate_up
        self._down = down
        self._ops = ops

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] → [T, hidden]."""
        return self._down(self._ops.silu_mul(self._gate_up(x, batch)), batch)
