"""flash-attention 3 as its makers distribute it: the module flash_attn_interface."""

import importlib
import importlib.util
import inspect
from functools import cache
from typing import Any

from torch import Tensor

from serve_app.attention.backend import AttentionNeeds, AttentionShape
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.gpu_limits import Limits
from serve_app.attention.report import BackendReport

NAME = "flash-attn-3"
MODULE = "flash_attn_interface"
LIMITS = Limits(((9, 0), (10, 0)))
ARGUMENTS = frozenset(
    ("q", "k_cache", "v_cache", "cache_seqlens", "page_table", "cu_seqlens_q", "max_seqlen_q", "softmax_scale",
     "causal", "window_size", "softcap")
)  # fmt: skip


class Flash3Attention:
    """See AttentionBackend."""

    name = NAME
    is_graph_safe = True

    def __init__(self, function: Any) -> None:
        """function: flash_attn_interface.flash_attn_with_kvcache."""
        self.function = function

    def plan(self, batch: DeviceBatch) -> "Flash3Plan":
        """See AttentionBackend."""
        return Flash3Plan(self.function, batch)


class Flash3Plan:
    """See PlannedAttention."""

    def __init__(self, function: Any, batch: DeviceBatch) -> None:
        self._function = function
        self._batch = batch

    def run(self, shape: AttentionShape, q: Tensor) -> Tensor:
        """See PlannedAttention."""
        batch = self._batch
        out: Tensor = self._function(
            q=q,
            k_cache=batch.k[shape.layer],
            v_cache=batch.v[shape.layer],
            cache_seqlens=batch.context_lens,
            page_table=batch.tables(shape.layer),
            cu_seqlens_q=batch.query_start,
            max_seqlen_q=batch.host.max_query_len,
            softmax_scale=shape.scale,
            causal=True,
            window_size=(shape.window - 1, 0) if shape.window else (-1, -1),
            softcap=shape.softcap,
        )
        return out.flatten(1)


@cache
def load() -> tuple[Any, str]:
    """The function, or None and the reason why there is none."""
    if importlib.util.find_spec(MODULE) is None:
        return None, f"{MODULE} is not installed"
    try:
        function = importlib.import_module(MODULE).flash_attn_with_kvcache
        found = set(inspect.signature(function).parameters)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        return None, f"{MODULE} does not load: {str(error).splitlines()[0]}"
    if missing := sorted(ARGUMENTS - found):
        return None, f"{MODULE} is of another version: its function takes no {', '.join(missing)}"
    return function, f"{MODULE} is installed"


def look(needs: AttentionNeeds) -> BackendReport:
    """Whether it can run."""
    if refusal := LIMITS.refusal(needs):
        return BackendReport(NAME, False, refusal)
    function, reason = load()
    return BackendReport(NAME, function is not None, reason)


def make(needs: AttentionNeeds) -> Flash3Attention:
    """The backend; look() said that there is one."""
    return Flash3Attention(load()[0])
