"""The parts of an engine, put together around a runner."""

from collections.abc import Sequence

from serve_app.engine.batch_builder import BatchBuilder
from serve_app.engine.engine_parts import EngineParts, Runner
from serve_app.engine.outputs import OutputCollector
from serve_app.engine.request_factory import RequestFactory
from serve_app.engine.scheduler import Scheduler
from serve_app.kv_cache.block_ledger import BlockLedger
from serve_app.kv_cache.block_pool import BlockPool
from serve_app.kv_cache.contiguous_pool import ContiguousPool
from serve_app.kv_cache.kv_pool import KvPool
from serve_app.kv_cache.layer_groups import KvWindow, longest_request
from serve_app.kv_cache.local_owner import LocalOwner
from serve_app.layers.angle_sets import AngleSets
from serve_app.options import EngineConfig, SamplingParams
from serve_app.text.detokenizer import DetokenizerTable
from serve_app.text.tokenizer import Tokenizer


def assemble(
    runner: Runner,
    pool: BlockLedger,
    kv: KvPool,
    tokenizer: Tokenizer,
    config: EngineConfig,
    max_seq_len: int,
    eos_ids: frozenset[int],
    sampling_defaults: SamplingParams,
    windows: Sequence[KvWindow] = (),
    angles: AngleSets | None = None,
) -> EngineParts:
    """The parts of an engine around a runner.

    windows: of each group of layers that has block tables of its own; none = one group that keeps all tokens. angles:
    the model's rotary sets, None = one for all requests.
    """
    windows = windows or (KvWindow(0, config.block_size, config.prefill_chunk_tokens),)
    pool_tokens = longest_request(windows, pool.num_total, max_seq_len)
    max_blocks = -(-min(max_seq_len, pool_tokens) // config.block_size)
    has_angle_sets = angles is not None and angles.are_several
    factory = RequestFactory(
        DetokenizerTable(tokenizer), eos_ids, tokenizer.vocab_size, max_seq_len, pool_tokens, config.seed
    )
    return EngineParts(
        scheduler=Scheduler(pool, config, windows, angles),
        builder=BatchBuilder(
            config.max_seqs, max_blocks, config.block_size, len(windows), has_angle_sets=has_angle_sets
        ),
        runner=runner,
        factory=factory,
        collector=OutputCollector(tokenizer, eos_ids),
        tokenizer=tokenizer,
        sampling_defaults=sampling_defaults,
        kv=kv,
    )


def ledger(config: EngineConfig, num_blocks: int, fingerprint: bytes) -> BlockLedger:
    """The block ledger that the options ask for."""
    if not config.paged_attention:
        return ContiguousPool(num_blocks, config.block_size)
    return BlockPool(LocalOwner(num_blocks), fingerprint, config.block_size, config.prefix_cache_n)
