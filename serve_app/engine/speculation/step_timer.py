"""How long steps of an engine take, measured before it serves."""

import time

import numpy as np

from serve_app.batch import Drafts, ForwardBatch, GroupTables
from serve_app.engine.engine_parts import EngineParts


class StepTimer:
    """Runs steps that verify drafts of nobody, in blocks of the cache that are free; nothing of them stays."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._num_groups = parts.scheduler.tables.num_groups

    def most_sequences(self, num_tokens: int) -> int:
        """How many sequences of so many tokens the cache has blocks for."""
        return self._parts.scheduler.pool.num_free // (self._num_groups * self._blocks(num_tokens))

    def measure(self, num_sequences: int, num_tokens: int) -> float:
        """Seconds of a step that computes num_tokens for num_sequences together, each the same number, and draws."""
        each = num_tokens // num_sequences
        width = self._blocks(each)
        pool = self._parts.scheduler.pool
        blocks = pool.allocate(self._num_groups * num_sequences * width)
        assert blocks is not None, "see most_sequences"
        try:
            tables = np.array(blocks, np.int32).reshape(self._num_groups, num_sequences, width)
            batch = self._batch(tables, each)
            began_s = time.perf_counter()
            self._parts.runner.execute(batch).wait()
            return time.perf_counter() - began_s
        finally:
            pool.release(blocks)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._parts.scheduler.pool.block_size)

    def _batch(self, tables: "np.ndarray[tuple[int, ...], np.dtype[np.int32]]", each: int) -> ForwardBatch:
        """tables [groups, sequences, blocks]; each: tokens of a sequence."""
        size, count = self._parts.scheduler.pool.block_size, tables.shape[1]
        place = np.arange(each)
        groups = [
            GroupTables((table[:, place // size].astype(np.int64) * size + place % size).reshape(-1), table)
            for table in tables
        ]
        num_tokens = count * each
        return ForwardBatch(
            token_ids=np.zeros(num_tokens, np.int64),
            positions=np.tile(place, count),
            slot_mapping=groups[0].slot_mapping,
            block_tables=groups[0].block_tables,
            query_start=np.arange(0, num_tokens + 1, each, dtype=np.int32),
            context_lens=np.full(count, each, np.int32),
            logit_index=np.arange(num_tokens),
            # Rows that belong to nobody yet draw the likeliest.
            sample_rows=np.arange(count),
            sample_positions=np.ones(count, np.int64),
            max_query_len=each,
            max_context_len=each,
            further_groups=tuple(groups[1:]),
            drafts=Drafts(np.full(count, each - 1), np.zeros(num_tokens - count, np.int64)),
        )
