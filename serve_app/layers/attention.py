"""Self-attention with grouped queries over the paged cache."""

import torch
from torch import Tensor

from serve_app.batch import ForwardBatch
from serve_app.layers.linear import Linear
from serve_app.layers.rotary import Rotary


class Attention:
    """Projects, rotates, lets the step's attention backend write K and V and attend, and projects back."""

    def __init__(
        self, layer: int, qkv: Linear, out: Linear, rotary: Rotary, n_heads: int, n_kv_heads: int, head_dim: int
    ) -> None:
        """qkv: hidden → (n_heads + 2 * n_kv_heads) * head_dim: queries, keys, values in this order."""
        self._layer = layer
        self._qkv = qkv
        self._out = out
        self._rotary = rotary
        self._heads = [n_heads, n_kv_heads, n_kv_heads]
        self._shape = (n_heads + 2 * n_kv_heads, head_dim)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] → [T, hidden]."""
        heads = self._qkv(x, batch).view(-1, *self._shape)
        q, k, v = torch.split_with_sizes(heads, self._heads, dim=1)
        self._rotary(q, k, batch)
        assert batch.attention is not None, "the step has no attention plan"
        return self._out(batch.attention.run(self._layer, q, k, v), batch)
