"""From a model's name to an engine that is ready to step."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from kernels import dispatch
from serve_app.cpu_info import num_physical_cores
from serve_app.engine.assembly import assemble, ledger
from serve_app.engine.device_choice import choose_device
from serve_app.engine.engine import Engine, OnDeltas
from serve_app.engine.engine_host import EngineHost
from serve_app.engine.graph_forward import GraphLimits
from serve_app.engine.kv_plan import KvPlan
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.model_switch import ModelSwitch, read_once
from serve_app.engine.no_collection import no_collection
from serve_app.engine.sampler import Sampler
from serve_app.errors import LaunchError
from serve_app.kv_cache.arena import PosixShmArena
from serve_app.kv_cache.kv_pool import KvPool, kv_dtype_name
from serve_app.kv_cache.pool_size import gpu_memory, num_pool_blocks
from serve_app.loaders.isq_progress import LoadProgress
from serve_app.loaders.load import LoadedModel, load_model
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.options import EngineConfig, ModelSource
from serve_app.text.tokenizer import Tokenizer, open_tokenizer
from serve_app.text.turn_ends import turn_end_ids

log = logging.getLogger(__name__)


def build_engine(
    source: ModelSource | ModelFiles, config: EngineConfig, on_deltas: OnDeltas, *, progress: LoadProgress | None = None
) -> Engine:
    """Loads a model and makes its engine; nothing runs until start() or step().

    progress: told while weights are quantised; None: the log. Raises ModelFileError for an unusable model, LaunchError
    for contradictory or impossible options.
    """
    files = resolve(source) if isinstance(source, ModelSource) else source
    config = replace(config, device=choose_device(config.device))
    say_what_computes(config.device)
    dispatch.set_num_threads(config.num_threads or num_physical_cores(), parks_at_once=config.shares_cores)
    with no_collection(), ThreadPoolExecutor(1, "tokenizer") as side:
        opening = side.submit(open_tokenizer, files.tokenizer_source, encodes=False)
        loaded = load_model(
            files,
            dtype=files.dtype,
            device=config.device,
            kv=config.kv_type,
            is_exact=config.cpu_exact,
            progress=progress,
            calibrate=read_once,
        )
        tokenizer = opening.result()
    plan = KvPlan.of(loaded.model, config, files.max_seq_len)
    kv = kv_pool(loaded, config, plan)
    windows, longest = plan.windows(kv.num_blocks), plan.longest(kv.num_blocks)
    if not longest:
        raise LaunchError(
            f"the KV pool has {kv.num_blocks} blocks of {kv.block_size} tokens, too few for a request: each of the "
            f"{len(plan.groups)} groups of layers needs its own"
        )
    pool = ledger(config, kv.num_blocks, loaded.fingerprint)
    eos_ids = frozenset(files.eos_ids) | frozenset(tokenizer.eos_ids) | turn_end_ids(files, tokenizer)
    sampler = Sampler(
        loaded.args.vocab_size, config.max_seqs, config.device, sorted(eos_ids), DryBreakers(tokenizer).ids
    )
    graphs = GraphLimits(config.max_seqs, longest) if config.cuda_graphs else None
    runner = ModelRunner(
        loaded.model,
        sampler,
        kv,
        config.device,
        config.attention_backend,
        is_exact=config.cpu_exact,
        graphs=graphs,
        overlaps=config.overlap,
    )
    log.info(
        "%s: %d KV blocks of %d tokens (%.0f MB, %s), context %d",
        files.model_name, kv.num_blocks, kv.block_size, kv.num_bytes / 1e6, kv_dtype_name(kv.dtype), files.max_seq_len,
    )  # fmt: skip
    if any(window.tokens for window in windows):
        log.info(
            "%s: a request of %d tokens holds up to %d blocks: layers with a window keep no more than it needs",
            files.model_name, longest, sum(window.most_blocks(longest) for window in windows),
        )  # fmt: skip
    parts = assemble(
        runner, pool, kv, tokenizer, config, files.max_seq_len, eos_ids, files.sampling_defaults(), windows,
        plan.angles,
    )  # fmt: skip
    engine = Engine(parts, config, on_deltas)
    host = EngineHost(engine, runner, files.max_seq_len)
    engine.switch = ModelSwitch(host, files, loaded.args, loaded.fingerprint)
    return engine


def say_what_computes(device: str) -> None:
    """One line in the log, a warning where plain torch does a CPU's work. LaunchError for what
    SIROCCO_CPU_ISA or SIROCCO_TRITON demands and this machine lacks."""
    try:
        native = dispatch.native()
        dispatch.triton_computes(device)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    if native.ops is not None:
        log.info("CPU kernels: %s", native.reason)
    elif device == "cpu":
        log.warning("CPU kernels: none, plain torch computes, which is slow: %s", native.reason)


class DryBreakers:
    """The token ids whose text contains a DRY sequence breaker."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._found: dict[str, list[int]] = {}

    def ids(self, breaker: str) -> list[int]:
        """All tokens that contain the string; searched once for each string."""
        if breaker not in self._found:
            wanted = breaker.encode()
            token_bytes = self._tokenizer.token_bytes
            self._found[breaker] = [i for i in range(self._tokenizer.vocab_size) if wanted in token_bytes(i)]
        return self._found[breaker]


def kv_pool(loaded: LoadedModel, config: EngineConfig, plan: KvPlan) -> KvPool:
    """A model's cache, of the size that the options ask for. Raises LaunchError."""
    if config.max_seqs > config.max_batched_tokens:
        raise LaunchError(
            f"--max-seqs {config.max_seqs} is over the {config.max_batched_tokens} tokens that a step may have"
        )
    args = loaded.args
    shape = (config.block_size, plan.layers_per_block, args.n_kv_heads, args.head_dim)
    bytes_per_block = KvPool.bytes_per_block(*shape, loaded.kv_dtype)
    context = plan.most_blocks * config.block_size
    gpu = gpu_memory(config.device)
    # Rotary tables take their place with the first steps.
    free, gpu_bytes = (None, None) if gpu is None else (max(0, gpu[0] - plan.table_bytes), gpu[1])
    num_blocks = num_pool_blocks(
        config, bytes_per_block, context, free, gpu_bytes=gpu_bytes, num_tables=len(plan.groups)
    )
    if gpu is not None:
        pool = KvPool.on_device(config.device, num_blocks, *shape, loaded.kv_dtype, plan.layers)
    else:
        pool = KvPool.create(PosixShmArena.create, num_blocks, *shape, loaded.kv_dtype, plan.layers)
    if loaded.kv_scales is not None:
        pool.k_scales, pool.v_scales = loaded.kv_scales
    return pool
