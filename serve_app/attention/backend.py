"""What the forward in plain torch asks of an attention backend."""

from dataclasses import dataclass
from typing import Protocol

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


class PlannedAttention(Protocol):
    """One step's attention: what plan() prepared, used by every layer."""

    def run(self, shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes k and v to the step's slots of the layer, then attends causally over each request's whole context.

        q [T, n_heads, head_dim], k and v [T, n_kv_heads, head_dim], rotated, unit stride in the last dimension;
        returns [T, n_heads * head_dim] in q's dtype.
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute paged attention; holds no state between steps."""

    @property
    def name(self) -> str: ...

    def plan(self, batch: DeviceBatch) -> PlannedAttention:
        """Prepares the step once for all layers."""
        ...
