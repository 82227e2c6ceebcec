"""What a draft replica serves, and on what: AppConfig → DraftPlan. Imports no Ray."""

from dataclasses import dataclass, replace

from deployments.actor_options import draft_has_cores, draft_shares_gpu, draft_threads, target_engine
from serve_app.config import AppConfig
from serve_app.gpu_info import wants_gpu
from serve_app.options import EngineConfig, ModelSource

# Tokens that a draft on a GPU keeps of each request that runs; those of the others are computed again when they are
# asked for. A pool as an engine's would take the memory that the target's needs.
_TOKENS_PER_REQUEST = 2048


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """source: the draft model; target: whose tokens it proposes. engine: sizes and device of its cache and forward.
    maps_text: the two have different vocabularies. works_ahead: see Drafter; spins: see Waiting."""

    source: ModelSource
    target: ModelSource
    engine: EngineConfig
    maps_text: bool = False
    works_ahead: bool = True
    spins: bool = False


def draft_plan(config: AppConfig, *, is_private: bool) -> DraftPlan:
    """Of a configuration with a draft model, on the machine that asks.

    On the CPU a draft and its target run in turn, each on all of the target's cores, unless there are cores besides:
    there the draft does not work ahead, which would slow the target down.
    """
    assert config.speculation.draft is not None
    engine = replace(
        target_engine(config, is_private=is_private),
        num_threads=draft_threads(config, is_private=is_private),
        pool_mb=None,
        pool_fraction=None,
        pool_tokens=None,
    )
    works_ahead = has_cores = draft_has_cores(config, is_private=is_private)
    if wants_gpu(engine.device, is_private=is_private):
        engine = replace(engine, pool_tokens=config.engine.max_seqs * _TOKENS_PER_REQUEST)
        works_ahead = not draft_shares_gpu(config, is_private=is_private)
    return DraftPlan(
        config.speculation.draft.to_source(),
        config.model.to_source(),
        engine,
        config.speculation.maps_text,
        works_ahead,
        has_cores,
    )
