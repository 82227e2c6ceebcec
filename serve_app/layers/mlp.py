"""Feed-forward layers."""

from serve_app.layers.linear import Linear
from serve_app.layers.step import Activation, Rows, Step


class GatedMLP:
    """down(f(gate(x)) * up(x)). Source: Shazeer 2020, SwiGLU."""

    def __init__(self, gate_up: Linear, down: Linear, activation: Activation = "silu") -> None:
        """gate_up: hidden → 2 * intermediate: gate, then up."""
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    def __call__(self, x: Rows, step: Step) -> Rows:
        """x [T, hidden] → [T, hidden]."""
        return self._down(step.gate(self._gate_up(x, step), self._activation), step)


class PlainMLP:
    """down(f(up(x)))."""

    def __init__(self, up: Linear, down: Linear, activation: Activation) -> None:
        self._up = up
        self._down = down
        self._activation = activation

    def __call__(self, x: Rows, step: Step) -> Rows:
        """x [T, hidden] → [T, hidden]."""
        return self._down(step.activate(self._up(x, step), self._activation), step)
