"""Attention in plain torch: always there, on every device, and the oracle of the others."""

from torch import Tensor

from kernels.reference.attention import paged_attention, paged_decode
from kernels.reference.norm import kv_write
from serve_app.batch import ForwardBatch


class TorchAttention:
    """Steps of decodes alone run in one piece; with a prefill among them, request by request."""

    name = "torch"

    def plan(self, batch: ForwardBatch) -> "TorchStep":
        """Copies the lengths to the host when the step needs them there."""
        return TorchStep(batch)


class TorchStep:
    """See PlannedAttention."""

    def __init__(self, batch: ForwardBatch) -> None:
        self._batch = batch
        self._is_decode = batch.max_query_len == 1 and batch.num_tokens == batch.num_requests
        self._query_start: list[int] = [] if self._is_decode else batch.query_start.tolist()
        self._context_lens: list[int] = [] if self._is_decode else batch.context_lens.tolist()

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See PlannedAttention."""
        batch = self._batch
        k_cache, v_cache = batch.kv.k[layer], batch.kv.v[layer]
        kv_write(k, v, k_cache, v_cache, batch.slot_mapping)
        if self._is_decode:
            return paged_decode(q, k_cache, v_cache, batch.block_tables, batch.context_lens)
        return paged_attention(q, k_cache, v_cache, batch.block_tables, self._query_start, self._context_lens)
