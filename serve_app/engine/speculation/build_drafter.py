"""From a draft model's name to a Drafter."""

import logging
from dataclasses import replace

from kernels import dispatch
from serve_app.cpu_info import num_physical_cores
from serve_app.engine.assembly import ledger
from serve_app.engine.build import kv_pool, say_what_computes
from serve_app.engine.device_choice import choose_device
from serve_app.engine.kv_plan import KvPlan
from serve_app.engine.model_switch import ModelSwitch, read_once
from serve_app.engine.no_collection import no_collection
from serve_app.engine.speculation.draft_host import DraftHost
from serve_app.engine.speculation.drafter import LEAST_CHANCE, Drafter
from serve_app.errors import LaunchError
from serve_app.kv_cache.layer_groups import LayerGroup
from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.options import EngineConfig, ModelSource

log = logging.getLogger(__name__)


def build_drafter(
    source: ModelSource | ModelFiles,
    config: EngineConfig,
    *,
    least_chance: float = LEAST_CHANCE,
    works_ahead: bool = True,
    seed: int | None = None,
    num_ids: int | None = None,
) -> Drafter:
    """Loads a draft model and its cache. config: of the drafter, sizes and device as an engine's.

    seed, num_ids: see Drafter. In a process that also runs a target, config.num_threads has to be the target's. Raises
    ModelFileError for an unusable model, LaunchError for contradictory or impossible options.
    """
    files = resolve(source) if isinstance(source, ModelSource) else source
    config = replace(config, device=choose_device(config.device), paged_attention=True, prefix_cache_n=0)
    say_what_computes(config.device)
    dispatch.set_num_threads(config.num_threads or num_physical_cores(), parks_at_once=config.shares_cores)
    with no_collection():
        loaded = load_model(
            files,
            dtype=files.dtype,
            device=config.device,
            kv=config.kv_type,
            is_exact=config.cpu_exact,
            calibrate=read_once,
        )
    plan = KvPlan.of(loaded.model, config, files.max_seq_len)
    # Rejected tokens may lie anywhere before a window's beginning: blocks are kept, windows only mask.
    plan = replace(plan, groups=(LayerGroup(0, tuple(range(loaded.args.n_layers))),))
    kv = kv_pool(loaded, config, plan)
    if not plan.longest(kv.num_blocks):
        raise LaunchError(f"the draft's KV pool has {kv.num_blocks} blocks of {kv.block_size} tokens, too few")
    log.info("draft model %s: %d KV blocks of %d tokens", files.model_name, kv.num_blocks, kv.block_size)
    pool = ledger(config, kv.num_blocks, loaded.fingerprint)
    drafter = Drafter(
        loaded.model, kv, pool, plan, config,
        least_chance=least_chance, works_ahead=works_ahead, seed=seed, num_ids=num_ids,
    )  # fmt: skip
    # Not `loaded`: that would keep its weights for ever.
    args, fingerprint = loaded.args, loaded.fingerprint
    drafter.make_switch = lambda border: ModelSwitch(
        DraftHost(drafter, border, config, files.max_seq_len), files, args, fingerprint
    )
    return drafter
