"""How large a draft model's cache is beside its target's. Imports no torch."""

from dataclasses import replace

from serve_app.options import EngineConfig

# Tokens that a draft on a GPU keeps of each request that runs; those of the others are computed again when they are
# asked for. A pool as an engine's would take the memory that the target's needs.
_TOKENS_PER_REQUEST = 2048


def draft_config(target: EngineConfig, *, is_on_gpu: bool) -> EngineConfig:
    """The draft's sizes and device, of its target's: all but the size of the pool, which is the target's own."""
    pool_tokens = target.max_seqs * _TOKENS_PER_REQUEST if is_on_gpu else None
    return replace(target, pool_mb=None, pool_fraction=None, pool_tokens=pool_tokens)
