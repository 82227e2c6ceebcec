"""vllm-flash-attn: the flash-attention 2 and 3 operators that the vllm distribution carries, without importing it.

A distribution of its own, vllm_flash_attn, is taken too: by its operators, or else by its Python function.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from serve_app.attention.backend import AttentionNeeds, AttentionShape
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.flash_library import find_library, load_operator
from serve_app.attention.gpu_limits import Limits
from serve_app.attention.op_schema import BoundOperator, missing_arguments
from serve_app.attention.report import BackendReport
from serve_app.attention.vllm_flash_module import ModuleFlashAttention, load_module

NAME = "vllm-flash-attn"


@dataclass(frozen=True, slots=True, eq=False)
class FlashVersion:
    """One generation of operators. arguments: those that we give, with their types. table: what it calls the block
    table. constants: of arguments that have no default and are always the same here."""

    number: int
    library: str
    operator: str
    limits: Limits
    table: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]


_COMMON = {
    "q": "Tensor",
    "k": "Tensor",
    "v": "Tensor",
    "out": "Tensor",
    "cu_seqlens_q": "Tensor",
    "seqused_k": "Tensor",
    "max_seqlen_q": "int",
    "max_seqlen_k": "int",
    "softmax_scale": "float",
    "is_causal": "bool",
    "window_size_left": "int",
    "window_size_right": "int",
    "softcap": "float",
}

FLASH_2 = FlashVersion(
    2,
    "_vllm_fa2_C",
    "varlen_fwd",
    Limits(((8, 0), (13, 0)), block_multiple=16),
    "block_table",
    _COMMON
    | {
        "cu_seqlens_k": "Tensor",
        "block_table": "Tensor",
        "p_dropout": "float",
        "zero_tensors": "bool",
        "return_softmax": "bool",
    },
    {"p_dropout": 0.0, "zero_tensors": False, "return_softmax": False},
)
FLASH_3 = FlashVersion(
    3,
    "_vllm_fa3_C",
    "fwd",
    Limits(((9, 0), (10, 0))),
    "page_table",
    _COMMON | {"page_table": "Tensor", "is_rotary_interleaved": "bool", "num_splits": "int", "sm_margin": "int"},
    {"is_rotary_interleaved": False, "num_splits": 0, "sm_margin": 0},
)
# Context parallelism, and splits in flash-attention 2, came with later versions; as many are given as there are.
_LATER = {
    "num_splits": ("int", 0),
    "cp_world_size": ("int", 1),
    "cp_rank": ("int", 0),
}
VERSIONS = (FLASH_3, FLASH_2)


class VllmFlashAttention:
    """See AttentionBackend."""

    name = NAME
    is_graph_safe = True

    def __init__(
        self, version: FlashVersion, call: Callable[[Mapping[str, Any]], Any], later: Mapping[str, Any]
    ) -> None:
        """call: the operator by names; later: values of arguments that only some versions have."""
        self.version = version
        self._call = call
        self._constants = {**version.constants, **later}

    def plan(self, batch: DeviceBatch) -> "VllmFlashPlan":
        """See AttentionBackend."""
        return VllmFlashPlan(self, batch)

    def call(self, values: Mapping[str, Any]) -> None:
        """Runs the operator; what it writes is among the values."""
        self._call({**self._constants, **values})


class VllmFlashPlan:
    """See PlannedAttention."""

    def __init__(self, backend: VllmFlashAttention, batch: DeviceBatch) -> None:
        self._backend = backend
        self._batch = batch
        self._lengths = {
            "cu_seqlens_q": batch.query_start,
            "seqused_k": batch.context_lens,
            "max_seqlen_q": batch.host.max_query_len,
        }
        if "cu_seqlens_k" in backend.version.arguments:
            # Asked for and, with seqused_k, not read.
            self._lengths["cu_seqlens_k"] = batch.query_start

    def run(self, shape: AttentionShape, q: Tensor) -> Tensor:
        """See PlannedAttention."""
        batch = self._batch
        out = q.new_empty(q.shape)
        k_cache, tables = batch.k[shape.layer], batch.tables(shape.layer)
        self._backend.call(
            {
                "q": q,
                "k": k_cache,
                "v": batch.v[shape.layer],
                "out": out,
                **self._lengths,
                self._backend.version.table: tables,
                # What fits the tables, not the step's longest context: a graph is replayed with longer ones.
                "max_seqlen_k": tables.shape[1] * k_cache.shape[1],
                "softmax_scale": shape.scale,
                "is_causal": True,
                "window_size_left": shape.window - 1 if shape.window else -1,
                "window_size_right": 0 if shape.window else -1,
                "softcap": shape.softcap,
            }
        )
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class Loaded:
    """An operator that loaded and whose schema fits, or the reason why there is none."""

    backend: VllmFlashAttention | ModuleFlashAttention | None
    reason: str


@cache
def load(version: FlashVersion) -> Loaded:
    """Loads a version's library once."""
    path = find_library(version.library)
    if path is None:
        return Loaded(None, f"no installed distribution has {version.library}")
    try:
        operator, schema = load_operator(path, version.library, version.operator)
    except (OSError, RuntimeError, AttributeError) as error:
        return Loaded(None, f"{path.name} does not load: {str(error).splitlines()[0]}")
    return bind(version, operator, schema)


def bind(version: FlashVersion, operator: Any, schema: torch.FunctionSchema) -> Loaded:
    """A backend over an operator, or what of its schema does not fit."""
    names = {argument.name for argument in schema.arguments}
    later = {name: kind for name, (kind, _) in _LATER.items() if name in names}
    if wrong := missing_arguments(schema, {**version.arguments, **later}):
        return Loaded(None, f"{version.library}.{version.operator} is of another version: {'; '.join(wrong)}")
    values = {name: value for name, (_, value) in _LATER.items() if name in names}
    return Loaded(
        VllmFlashAttention(version, BoundOperator(operator, schema), values), f"flash-attention {version.number}"
    )


def _choose(needs: AttentionNeeds) -> Loaded:
    """The newest version that the device has and that can serve the model."""
    reasons = []
    for version in VERSIONS:
        refusal = version.limits.refusal(needs)
        loaded = Loaded(None, refusal) if refusal else load(version)
        if loaded.backend is not None:
            return loaded
        reasons.append(f"version {version.number}: {loaded.reason}")
    if needs.device.type != "cuda":
        return Loaded(None, f"the model is on {needs.device.type}")
    if FLASH_2.limits.refusal(needs) is None:
        function, reason = load_module()
        if function is not None:
            return Loaded(ModuleFlashAttention(function), reason)
        reasons.append(reason)
    return Loaded(None, "; ".join(reasons))


def look(needs: AttentionNeeds) -> BackendReport:
    """Whether it can run, after loading the library where the device and the model would do."""
    found = _choose(needs)
    return BackendReport(NAME, found.backend is not None, found.reason)


def make(needs: AttentionNeeds) -> VllmFlashAttention | ModuleFlashAttention:
    """The backend; look() said that there is one."""
    backend = _choose(needs).backend
    assert backend is not None
    return backend
