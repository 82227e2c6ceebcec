"""Self-attention with grouped queries over the paged cache."""

from serve_app.attention.backend import AttentionShape
from serve_app.layers.linear import Linear
from serve_app.layers.rotary import Rotary
from serve_app.layers.step import Rows, Step


class Attention:
    """Projects, lets the step rotate, write K and V and attend, and projects back."""

    def __init__(self, qkv: Linear, out: Linear, rotary: Rotary | None, shape: AttentionShape) -> None:
        """qkv: hidden → (n_heads + 2 * n_kv_heads) * head_dim: queries, keys, values in this order."""
        self._qkv = qkv
        self._out = out
        self._rotary = rotary
        self._shape = shape

    def __call__(self, x: Rows, step: Step) -> Rows:
        """x [T, hidden] → [T, hidden]."""
        return self._out(step.attention(self._qkv(x, step), self._shape, self._rotary), step)
