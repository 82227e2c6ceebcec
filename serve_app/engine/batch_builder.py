"""The schedule of a step → the flat arrays of a ForwardBatch."""

from collections.abc import Sequence

import numpy as np

from serve_app.batch import ForwardBatch
from serve_app.engine.request import Request
from serve_app.engine.scheduler import Schedule


class BatchBuilder:
    """Builds batches in numpy, without a loop over the tokens.

    Keeps the block tables of running requests by row, so that a decode step only touches those that got a block.
    """

    def __init__(self, max_seqs: int, max_blocks: int, block_size: int) -> None:
        self._tables = np.zeros((max_seqs, max_blocks), np.int32)
        self._block_size = block_size
        # Of decodes alone: every request has one token, whose logits are wanted.
        self._starts = np.arange(max_seqs + 1, dtype=np.int32)
        self._index = np.arange(max_seqs)

    def set_blocks(self, request: Request) -> None:
        """Takes over a running request's whole block list."""
        self._tables[request.row, : len(request.blocks)] = request.blocks

    def append_block(self, request: Request) -> None:
        """Takes over the last block of a running request's list."""
        last = len(request.blocks) - 1
        self._tables[request.row, last] = request.blocks[last]

    def build(self, step: Schedule, wanted_logits: Sequence[tuple[int, range]] = ()) -> ForwardBatch:
        """The batch of a step: its decodes, then its prefills, in the schedule's order.

        wanted_logits: (index into step.prefill, positions) of prompt tokens whose logits are to come back besides
        those that are sampled.
        """
        if not step.prefill:
            return self._decodes(step.decode)
        decode, prefill = step.decode, step.prefill
        num_decode = len(decode)
        counts = np.ones(num_decode + len(prefill), np.int64)
        counts[num_decode:] = [n for _, n in prefill]
        starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])

        requests = [*decode, *(r for r, _ in prefill)]
        rows = np.fromiter((r.row for r in requests), np.int64, len(requests))
        computed = np.fromiter((r.num_computed for r in requests), np.int64, len(requests))
        context = computed + counts
        token_ids = np.empty(starts[-1], np.int64)
        token_ids[:num_decode] = np.fromiter((r.token_ids[-1] for r in decode), np.int64, num_decode)
        for i, (request, n) in enumerate(prefill, num_decode):
            first = request.num_computed
            token_ids[starts[i] : starts[i + 1]] = request.token_ids[first : first + n]

        owner = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(starts[-1]) - starts[owner] + computed[owner]
        width = -(-int(context.max()) // self._block_size)
        tables = self._tables[rows, :width]
        block, offset = np.divmod(positions, self._block_size)
        slots = tables[owner, block].astype(np.int64) * self._block_size + offset

        # A request is sampled when this step computes its last known token.
        is_sampled = np.ones(len(counts), np.bool_)
        is_sampled[num_decode:] = [r.num_computed + n == len(r.token_ids) for r, n in prefill]
        sampled = np.flatnonzero(is_sampled)
        logit_index = [starts[1:][sampled] - 1]
        for i, span in wanted_logits:
            first = starts[num_decode + i] - prefill[i][0].num_computed
            logit_index.append(np.arange(span.start, span.stop) + first)
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            block_tables=tables,
            query_start=starts.astype(np.int32),
            context_lens=context.astype(np.int32),
            logit_index=np.concatenate(logit_index),
            sample_rows=rows[sampled],
            sample_positions=context[sampled],
            max_query_len=int(counts.max()),
            max_context_len=int(context.max()),
        )

    def _decodes(self, requests: Sequence[Request]) -> ForwardBatch:
        """Most steps are of this kind. A list a number of each request: half of the time of an array a number."""
        size = self._block_size
        positions = [r.num_computed for r in requests]
        slots = [r.blocks[n // size] * size + n % size for r, n in zip(requests, positions, strict=True)]
        lists = [[r.token_ids[-1] for r in requests], positions, slots, [r.row for r in requests]]
        token_ids, computed, slot_mapping, rows = np.array(lists, np.int64)
        longest, count = max(positions) + 1, len(requests)
        context = computed + 1
        return ForwardBatch(
            token_ids=token_ids,
            positions=computed,
            slot_mapping=slot_mapping,
            block_tables=self._tables[rows, : -(-longest // size)],
            query_start=self._starts[: count + 1],
            context_lens=context.astype(np.int32),
            logit_index=self._index[:count],
            sample_rows=rows,
            sample_positions=context,
            max_query_len=1,
            max_context_len=longest,
        )
