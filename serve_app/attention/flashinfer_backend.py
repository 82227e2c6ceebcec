"""flashinfer: paged prefill kernels, planned on the host, for steps that are not captured in graphs."""

import importlib
import importlib.util
import inspect
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.reference.sampling import without_waiting
from serve_app.attention.backend import AttentionNeeds, AttentionShape
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.gpu_limits import Limits
from serve_app.attention.report import BackendReport

NAME = "flashinfer"
WORKSPACE_BYTES = 128 << 20
LIMITS = Limits(((8, 0), (13, 0)), head_dims=(64, 128, 256), is_graph_safe=False)
PLAN_ARGUMENTS = frozenset(
    ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "num_qo_heads", "num_kv_heads",
     "head_dim_qk", "page_size", "causal", "sm_scale", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type")
)  # fmt: skip


Kind: TypeAlias = tuple[int, AttentionShape]
"""A group of layers, and a shape without the layer's own number."""


class FlashinferAttention:
    """See AttentionBackend."""

    name = NAME
    is_graph_safe = False

    def __init__(self, wrapper_class: Any, device: torch.device) -> None:
        """wrapper_class: flashinfer.BatchPrefillWithPagedKVCacheWrapper."""
        self._class = wrapper_class
        self._device = device
        self._workspace: Tensor | None = None
        self._wrappers: dict[tuple[Kind, bool], Any] = {}
        self._is_odd = False

    def plan(self, batch: DeviceBatch) -> "FlashinferPlan":
        """See AttentionBackend."""
        self._is_odd = not self._is_odd
        return FlashinferPlan(self, batch)

    def wrapper(self, kind: Kind) -> Any:
        """Two for each kind of layer, taken in turn: a plan lies in its memory, on the host too, until the step is
        done, and the next step may be planned before. Results in between share one memory, as kernels follow one
        another."""
        key = (kind, self._is_odd)
        if key not in self._wrappers:
            if self._workspace is None:
                self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
            self._wrappers[key] = self._class(self._workspace, "NHD")
        return self._wrappers[key]


class FlashinferPlan:
    """See PlannedAttention: layers of the same kind share a plan, made for the first of them."""

    def __init__(self, backend: FlashinferAttention, batch: DeviceBatch) -> None:
        self._backend = backend
        self._batch = batch
        self._planned: dict[Kind, Any] = {}
        self._tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def run(self, shape: AttentionShape, q: Tensor) -> Tensor:
        """See PlannedAttention."""
        batch = self._batch
        kind = (batch.groups[shape.layer], replace(shape, layer=0))
        if kind not in self._planned:
            self._planned[kind] = self._plan(kind, q.dtype)
        out: Tensor = self._planned[kind].run(q.contiguous(), (batch.k[shape.layer], batch.v[shape.layer]))
        return out.flatten(1)

    def _plan(self, kind: Kind, dtype: torch.dtype) -> Any:
        batch, (group, shape) = self._batch, kind
        block_size, device = batch.k[0].shape[1], batch.block_tables[0].device
        if group not in self._tables:
            tables = batch.host.groups[group].block_tables
            self._tables[group] = block_lists(tables, batch.host.context_lens, block_size)
        starts, blocks, last = self._tables[group]
        wrapper = self._backend.wrapper(kind)
        wrapper.plan(
            qo_indptr=torch.from_numpy(batch.host.query_start),
            paged_kv_indptr=starts,
            paged_kv_indices=without_waiting(blocks, device),
            paged_kv_last_page_len=last,
            num_qo_heads=shape.n_heads,
            num_kv_heads=shape.n_kv_heads,
            head_dim_qk=shape.head_dim,
            page_size=block_size,
            causal=True,
            sm_scale=shape.scale,
            window_left=shape.window - 1 if shape.window else -1,
            logits_soft_cap=shape.softcap or None,
            q_data_type=dtype,
            kv_data_type=batch.k[0].dtype,
        )
        return wrapper


def block_lists(
    tables: NDArray[np.int32], context_lens: NDArray[np.int32], block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Block tables [R, max_blocks] as flashinfer takes them, int32 on the CPU: where each request's blocks begin [R +
    1], the blocks one after the other, and how many tokens the last one holds [R]."""
    counts = -(-context_lens // block_size)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    is_used = np.arange(tables.shape[1]) < counts[:, None]
    last = context_lens - np.maximum(counts - 1, 0) * block_size
    return tuple(torch.from_numpy(np.ascontiguousarray(a, np.int32)) for a in (starts, tables[is_used], last))  # type: ignore[return-value]


@cache
def load() -> tuple[Any, str]:
    """The wrapper class, or None and the reason why there is none."""
    if importlib.util.find_spec(NAME) is None:
        return None, f"{NAME} is not installed"
    try:
        found = importlib.import_module(NAME).BatchPrefillWithPagedKVCacheWrapper
        arguments = set(inspect.signature(found.plan).parameters)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        return None, f"{NAME} does not load: {str(error).splitlines()[0]}"
    if missing := sorted(PLAN_ARGUMENTS - arguments):
        return None, f"{NAME} is of another version: its plan takes no {', '.join(missing)}"
    return found, f"{NAME} is installed"


def look(needs: AttentionNeeds) -> BackendReport:
    """Whether it can run."""
    if refusal := LIMITS.refusal(needs):
        return BackendReport(NAME, False, refusal)
    found, reason = load()
    return BackendReport(NAME, found is not None, reason)


def make(needs: AttentionNeeds) -> FlashinferAttention:
    """The backend; look() said that there is one."""
    return FlashinferAttention(load()[0], needs.device)
