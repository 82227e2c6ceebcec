"""Our own paged attention in Triton: every head size, every block size, soft cap, window and e4m3 caches."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.gpu.support import FP8_ARCHITECTURE, triton_support
from serve_app.attention.backend import AttentionNeeds, AttentionShape
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.report import BackendReport

if TYPE_CHECKING:
    from kernels.gpu.attention_plan import AttentionPlan

NAME = "triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
"""Above it a tile of keys does not fit the shared memory of all architectures."""


class TritonAttention:
    """See AttentionBackend."""

    name = NAME
    is_graph_safe = True

    def plan(self, batch: DeviceBatch) -> "TritonPlan":
        """See AttentionBackend."""
        return TritonPlan(batch)


class TritonPlan:
    """See PlannedAttention. Layers of a group with the same head counts share one cut into programs."""

    def __init__(self, batch: DeviceBatch) -> None:
        self._batch = batch
        self._plans: dict[tuple[int, int, int, int, int], AttentionPlan] = {}

    def run(self, shape: AttentionShape, q: Tensor) -> Tensor:
        """See PlannedAttention."""
        from kernels.gpu.paged_attention import attend

        batch = self._batch
        return attend(
            self._plan(shape, q), q, batch.k[shape.layer], batch.v[shape.layer], shape.scale, shape.softcap,
            shape.window, *batch.scales(shape.layer),
        )  # fmt: skip

    def _plan(self, shape: AttentionShape, q: Tensor) -> "AttentionPlan":
        from kernels.gpu.attention_plan import AttentionPlan

        batch = self._batch
        heads = (shape.n_heads, shape.n_kv_heads, shape.head_dim, q.element_size())
        key = (batch.groups[shape.layer], *heads)
        if key not in self._plans:
            self._plans[key] = AttentionPlan(
                batch.tables(shape.layer), batch.query_start, batch.context_lens, len(q), batch.host.max_query_len,
                batch.k[shape.layer].shape[1], *heads,
            )  # fmt: skip
        return self._plans[key]


def look(needs: AttentionNeeds) -> BackendReport:
    """Whether it can run."""
    support = triton_support(needs.device)
    refusal = None if support.is_usable else support.reason
    if needs.dtype not in DTYPES:
        refusal = refusal or f"it does not compute in {needs.dtype}"
    if needs.kv_dtype not in DTYPES and not needs.is_fp8:
        refusal = refusal or "it reads no q8 KV cache"
    if needs.is_fp8 and needs.architecture is not None and needs.architecture < FP8_ARCHITECTURE:
        refusal = refusal or "e4m3 caches need compute capability 8.9"
    if max(needs.head_dims, default=0) > LARGEST_HEAD:
        refusal = refusal or f"heads of {max(needs.head_dims)} are over {LARGEST_HEAD}"
    return BackendReport(NAME, refusal is None, refusal or support.reason)


def make(needs: AttentionNeeds) -> TritonAttention:
    """The backend; look() said that there is one."""
    return TritonAttention()
