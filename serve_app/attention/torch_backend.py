"""Attention in plain torch: always there, on every device, and the oracle of the others."""

from torch import Tensor

from kernels.reference.attention import paged_attention, paged_decode
from serve_app.attention.backend import AttentionNeeds, AttentionShape
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.report import BackendReport


class TorchAttention:
    """Steps of decodes alone run in one piece; with a prefill among them, request by request."""

    name = "torch"
    is_graph_safe = False

    def plan(self, batch: DeviceBatch) -> "TorchPlan":
        """Takes the lengths from the host when the step needs them there."""
        return TorchPlan(batch)


class TorchPlan:
    """See PlannedAttention."""

    def __init__(self, batch: DeviceBatch) -> None:
        host = batch.host
        self._batch = batch
        self._is_decode = host.max_query_len == 1 and host.num_tokens == host.num_requests
        self._query_start: list[int] = [] if self._is_decode else host.query_start.tolist()
        self._context_lens: list[int] = [] if self._is_decode else host.context_lens.tolist()

    def run(self, shape: AttentionShape, q: Tensor) -> Tensor:
        """See PlannedAttention."""
        batch = self._batch
        k_cache, v_cache, scales = batch.k[shape.layer], batch.v[shape.layer], batch.scales(shape.layer)
        extra = (shape.scale, shape.softcap, shape.window, *scales)
        tables = batch.tables(shape.layer)
        if self._is_decode:
            return paged_decode(q, k_cache, v_cache, tables, batch.context_lens, *extra)
        return paged_attention(q, k_cache, v_cache, tables, self._query_start, self._context_lens, *extra)


def look(needs: AttentionNeeds) -> BackendReport:
    """Whether it can run: everywhere, but for a cache of the native kernels' own."""
    if needs.kv_dtype.itemsize == 1 and not needs.is_fp8:
        return BackendReport("torch", False, "a q8 KV cache needs the native CPU kernels")
    return BackendReport("torch", True, "plain torch runs everywhere")
