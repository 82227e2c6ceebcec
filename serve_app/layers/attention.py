"""Self-attention with grouped queries over the paged cache."""

from serve_app.attention.backend import AttentionShape
from serve_app.layers.linear import Linear
from serve_app.layers.step import AngleTable, NormWeights, Rows, Step


class Attention:
    """Projects, lets the step rotate, write K and V and attend, and projects back."""

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        rotary: AngleTable | None,
        shape: AttentionShape,
        head_norms: tuple[NormWeights, NormWeights] | None = None,
    ) -> None:
        """qkv: hidden → (n_heads + 2 * n_kv_heads) * head_dim: queries, keys, values in this order. head_norms: of each
        query head and of each key head before they are rotated."""
        self._qkv = qkv
        self._out = out
        self._rotary = rotary
        self._shape = shape
        self._head_norms = head_norms

    def __call__(self, x: Rows, step: Step) -> Rows:
        """x [T, hidden] → [T, hidden]."""
        qkv = self._qkv(x, step)
        if self._head_norms is not None:
            step.head_norm(qkv, 0, self._shape.n_heads, self._head_norms[0])
            step.head_norm(qkv, self._shape.n_heads, self._shape.n_kv_heads, self._head_norms[1])
        return self._out(step.attention(qkv, self._shape, self._rotary), step)
