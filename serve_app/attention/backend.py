"""What the attention layer asks of a backend."""

from typing import Protocol

from torch import Tensor

from serve_app.batch import ForwardBatch


class PlannedAttention(Protocol):
    """One step's attention: what plan() prepared, used by every layer."""

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes k and v to the step's slots of the layer, then attends causally over each request's whole context.

        q [T, n_heads, head_dim], k and v [T, n_kv_heads, head_dim], rotated, unit stride in the last dimension;
        returns [T, n_heads * head_dim] in q's dtype. Query head h reads KV head h // (n_heads // n_kv_heads).
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute paged attention; holds no state between steps."""

    @property
    def name(self) -> str: ...

    def plan(self, batch: ForwardBatch) -> PlannedAttention:
        """Prepares the step once for all layers."""
        ...
