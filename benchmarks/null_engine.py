"""An engine around the null runner, with the real scheduler, ledger, tokenizer and detokenizer."""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.null_runner import NullRunner
from serve_app.engine.assembly import assemble, ledger
from serve_app.engine.engine import Engine, OnDeltas
from serve_app.kv_cache.arena import PosixShmArena
from serve_app.kv_cache.kv_pool import KvPool
from serve_app.kv_cache.layer_groups import LayerGroup, fit_windows
from serve_app.options import EngineConfig, SamplingParams
from serve_app.text.tokenizer import open_tokenizer

FIRST_TEXT_ID = 259


def null_engine(
    tokenizer_folder: Path,
    config: EngineConfig,
    max_seq_len: int,
    num_blocks: int,
    on_deltas: OnDeltas = lambda deltas: None,
    *,
    windows: Sequence[int] = (0,),
    overlaps: bool = False,
) -> Engine:
    """No model: ids in the range of the tokenizer's text tokens come from seed and position. windows: of the groups of
    layers that it would have."""
    tokenizer = open_tokenizer(tokenizer_folder)
    kv = KvPool.create(PosixShmArena.create, num_blocks, config.block_size, 1, 1, 1, torch.float32)
    runner = NullRunner(config.max_seqs, FIRST_TEXT_ID, tokenizer.vocab_size - 1, overlaps=overlaps)
    pool = ledger(config, num_blocks, b"null")
    eos_ids = frozenset(tokenizer.eos_ids)
    groups = [LayerGroup(window, (0,)) for window in windows]
    fitting = fit_windows(groups, config.block_size, config.prefill_chunk_tokens, num_blocks, max_seq_len)
    parts = assemble(runner, pool, kv, tokenizer, config, max_seq_len, eos_ids, SamplingParams(), fitting)
    return Engine(parts, config, on_deltas)
