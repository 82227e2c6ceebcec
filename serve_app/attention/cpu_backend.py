"""Attention by the native CPU kernels: all requests of a step in one call per layer."""

from types import ModuleType
from typing import Any

from torch import Tensor

from serve_app.batch import ForwardBatch


class CpuAttention:
    """Hands each step to kernels.cpu, which cuts it into pieces of even size for its threads."""

    name = "cpu"

    def __init__(self, ops: ModuleType) -> None:
        """ops: kernels.cpu.ops, as kernels.dispatch.native gives it."""
        self._ops = ops

    def plan(self, batch: ForwardBatch) -> "CpuStep":
        """Leaves the work to the first layer: only it shows the number of heads."""
        return CpuStep(self._ops, batch)


class CpuStep:
    """See PlannedAttention. Every layer of the step shares one native plan, so all have the same heads."""

    def __init__(self, ops: ModuleType, batch: ForwardBatch) -> None:
        self._ops = ops
        self._batch = batch
        self._plan: Any = None

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See PlannedAttention."""
        batch = self._batch
        k_cache, v_cache = batch.kv.k[layer], batch.kv.v[layer]
        self._ops.kv_write(k, v, k_cache, v_cache, batch.slot_mapping)
        if self._plan is None:
            self._plan = self._ops.AttentionPlan(
                batch.block_tables, batch.query_start, batch.context_lens, batch.num_tokens, k_cache.shape, q.shape[1]
            )
        out: Tensor = self._plan.run(q.float(), k_cache, v_cache)
        return out.to(q.dtype)
