"""vllm_flash_attn as a package of its own: its Python function, where its operators are not to be had by name."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache

from torch import Tensor
from torch.nn import functional

from serve_app.attention.backend import AttentionShape
from serve_app.attention.device_batch import DeviceBatch

MODULE = "vllm_flash_attn"
FUNCTION = "flash_attn_varlen_func"
ARGUMENTS = frozenset(
    ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal",
     "window_size", "softcap", "block_table")
)  # fmt: skip

Attend = Callable[..., Tensor]


class ModuleFlashAttention:
    """See AttentionBackend."""

    name = "vllm-flash-attn"
    is_graph_safe = True

    def __init__(self, function: Attend) -> None:
        """function: vllm_flash_attn.flash_attn_varlen_func. Later versions take lengths, earlier ones their sums."""
        self.function = function
        self.takes_lengths = "seqused_k" in inspect.signature(function).parameters

    def plan(self, batch: DeviceBatch) -> "ModuleFlashPlan":
        """See AttentionBackend."""
        return ModuleFlashPlan(self, batch)


class ModuleFlashPlan:
    """See PlannedAttention."""

    def __init__(self, backend: ModuleFlashAttention, batch: DeviceBatch) -> None:
        self._backend = backend
        self._batch = batch
        if backend.takes_lengths:
            self._lengths = {"seqused_k": batch.context_lens}
        else:
            sums = functional.pad(batch.context_lens.cumsum(0), (1, 0)).to(batch.context_lens.dtype)
            self._lengths = {"cu_seqlens_k": sums}

    def run(self, shape: AttentionShape, q: Tensor) -> Tensor:
        """See PlannedAttention."""
        batch = self._batch
        k_cache, tables = batch.k[shape.layer], batch.tables(shape.layer)
        out = self._backend.function(
            q=q,
            k=k_cache,
            v=batch.v[shape.layer],
            cu_seqlens_q=batch.query_start,
            max_seqlen_q=batch.host.max_query_len,
            max_seqlen_k=tables.shape[1] * k_cache.shape[1],
            softmax_scale=shape.scale,
            causal=True,
            window_size=(shape.window - 1, 0) if shape.window else (-1, -1),
            softcap=shape.softcap,
            block_table=tables,
            **self._lengths,
        )
        return out.flatten(1)


@cache
def load_module() -> tuple[Attend | None, str]:
    """The function, or None and the reason why there is none."""
    if importlib.util.find_spec(MODULE) is None:
        return None, f"no package {MODULE} of its own"
    try:
        function: Attend = getattr(importlib.import_module(MODULE), FUNCTION)
        found = set(inspect.signature(function).parameters)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        return None, f"{MODULE} does not load: {str(error).splitlines()[0]}"
    if missing := sorted(ARGUMENTS - found):
        return None, f"{MODULE} is of another version: its function takes no {', '.join(missing)}"
    return function, f"the package {MODULE}"
