"""What a draft replica serves, and on what: AppConfig → DraftPlan. Imports no Ray."""

from dataclasses import dataclass, replace

from deployments.actor_options import draft_has_cores, draft_shares_gpu, draft_threads, target_engine
from serve_app.config import AppConfig
from serve_app.engine.speculation.draft_config import draft_config
from serve_app.gpu_info import wants_gpu
from serve_app.options import EngineConfig, ModelSource


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
    target = target_engine(config, is_private=is_private)
    is_on_gpu = wants_gpu(target.device, is_private=is_private)
    engine = draft_config(target, is_on_gpu=is_on_gpu)
    engine = replace(engine, num_threads=draft_threads(config, is_private=is_private))
    works_ahead = has_cores = draft_has_cores(config, is_private=is_private)
    if is_on_gpu:
        works_ahead = not draft_shares_gpu(config, is_private=is_private)
    return DraftPlan(
        config.speculation.draft.to_source(),
        config.model.to_source(),
        engine,
        config.speculation.maps_text,
        works_ahead,
        has_cores,
    )
