"""The schedule of a step → the flat arrays of a ForwardBatch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve_app.batch import DraftChances, Drafts, ForwardBatch, GroupTables
from serve_app.engine.request import Request
from serve_app.engine.scheduler import Schedule
from serve_app.engine.speculation.draft_call import Draft, SampledTokens


class BatchBuilder:
    """Builds batches in numpy, without a loop over the tokens.

    Keeps the block tables of running requests by row, so that a decode step only touches those that got a block.
    """

    def __init__(
        self, max_seqs: int, max_blocks: int, block_size: int, num_groups: int = 1, *, has_angle_sets: bool = False
    ) -> None:
        """num_groups: of layers, each with a table of its own. has_angle_sets: requests differ in their rotary set."""
        self._tables = [np.zeros((max_seqs, max_blocks), np.int32) for _ in range(num_groups)]
        self._lengths = [[0] * max_seqs for _ in range(num_groups)]
        self._block_size = block_size
        self._has_angle_sets = has_angle_sets
        # Of decodes alone: every request has one token, whose logits are wanted.
        self._starts = np.arange(max_seqs + 1, dtype=np.int32)
        self._index = np.arange(max_seqs)

    def set_blocks(self, request: Request) -> None:
        """Takes over a running request's whole tables."""
        for lengths in self._lengths:
            lengths[request.row] = 0
        self.append_block(request)

    def append_block(self, request: Request) -> None:
        """Takes over the blocks that a running request's tables got since.

        Blocks given up meanwhile stay in the row: nothing before a window is read, but every id must be a valid one.
        """
        row = request.row
        for rows, lengths, table in zip(self._tables, self._lengths, request.tables, strict=True):
            first, end = lengths[row], len(table)
            if end > first:
                rows[row, first:end] = table[first:]
                if not first:
                    np.maximum(rows[row, :end], 0, out=rows[row, :end])
                lengths[row] = end

    def build(self, step: Schedule, wanted_logits: Sequence[tuple[int, range]] = ()) -> ForwardBatch:
        """The batch of a step: its decodes, then its prefills, in the schedule's order.

        wanted_logits: (index into step.prefill, positions) of prompt tokens whose logits are to come back besides
        those that are sampled.
        """
        if not step.prefill and not step.is_drafted:
            return self._decodes(step.decode)
        decode, prefill = step.decode, step.prefill
        num_decode = len(decode)
        counts = np.ones(num_decode + len(prefill), np.int64)
        counts[num_decode:] = [n for _, n in prefill]
        if step.is_drafted:
            counts[:num_decode] += [len(r.draft) for r in decode]
        starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])

        requests = [*decode, *(r for r, _ in prefill)]
        rows = np.fromiter((r.row for r in requests), np.int64, len(requests))
        computed = np.fromiter((r.num_computed for r in requests), np.int64, len(requests))
        context = computed + counts
        token_ids = np.empty(starts[-1], np.int64)
        if step.is_drafted:
            token_ids[: starts[num_decode]] = [i for r in decode for i in (r.token_ids[-1], *r.draft)]
        else:
            token_ids[:num_decode] = np.fromiter((r.token_ids[-1] for r in decode), np.int64, num_decode)
        for i, (request, n) in enumerate(prefill, num_decode):
            first = request.num_computed
            token_ids[starts[i] : starts[i + 1]] = request.token_ids[first : first + n]

        owner = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(starts[-1]) - starts[owner] + computed[owner]
        width = -(-int(context.max()) // self._block_size)
        block, offset = np.divmod(positions, self._block_size)
        tables = [table[rows, :width] for table in self._tables]
        slots = [table[owner, block].astype(np.int64) * self._block_size + offset for table in tables]
        if self._has_angle_sets:
            positions += np.fromiter((r.angles.first_row for r in requests), np.int64, len(requests))[owner]

        # A request is sampled when this step computes its last known token.
        is_sampled = np.ones(len(counts), np.bool_)
        is_sampled[num_decode:] = [r.num_computed + n == len(r.token_ids) for r, n in prefill]
        sampled = np.flatnonzero(is_sampled)
        logit_index, drafts, next_positions = [starts[1:][sampled] - 1], None, context[sampled]
        if step.is_drafted:
            # All tokens of a decode are sampled, of a prompt the last one.
            logit_index.insert(0, np.arange(starts[num_decode]))
            logit_index[1] = logit_index[1][num_decode:]
            num_drafted = np.zeros(len(sampled), np.int64)
            num_drafted[:num_decode] = counts[:num_decode] - 1
            drafts = _drafts(num_drafted, [r.draft for r in decode])
            next_positions = next_positions - num_drafted
        for i, span in wanted_logits:
            first = starts[num_decode + i] - prefill[i][0].num_computed
            logit_index.append(np.arange(span.start, span.stop) + first)
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots[0],
            block_tables=tables[0],
            query_start=starts.astype(np.int32),
            context_lens=context.astype(np.int32),
            logit_index=np.concatenate(logit_index),
            sample_rows=rows[sampled],
            sample_positions=next_positions,
            max_query_len=int(counts.max()),
            max_context_len=int(context.max()),
            further_groups=tuple(map(GroupTables, slots[1:], tables[1:])),
            drafts=drafts,
        )

    def _decodes(self, requests: Sequence[Request]) -> ForwardBatch:
        """Most steps are of this kind. A list a number of each request: half of the time of an array a number."""
        size = self._block_size
        positions = [r.num_computed for r in requests]
        lists = [[r.token_ids[-1] for r in requests], positions, [r.row for r in requests]]
        lists += [
            [r.tables[group][n // size] * size + n % size for r, n in zip(requests, positions, strict=True)]
            for group in range(len(self._tables))
        ]
        token_ids, computed, rows, *slots = np.array(lists, np.int64)
        longest, count = max(positions) + 1, len(requests)
        context = computed + 1
        if self._has_angle_sets:
            computed += [r.angles.first_row for r in requests]
        tables = [table[rows, : -(-longest // size)] for table in self._tables]
        return ForwardBatch(
            token_ids=token_ids,
            positions=computed,
            slot_mapping=slots[0],
            block_tables=tables[0],
            query_start=self._starts[: count + 1],
            context_lens=context.astype(np.int32),
            logit_index=self._index[:count],
            sample_rows=rows,
            sample_positions=context,
            max_query_len=1,
            max_context_len=longest,
            further_groups=tuple(map(GroupTables, slots[1:], tables[1:])),
        )


def _drafts(counts: NDArray[np.int64], drafts: Sequence[Draft]) -> Drafts:
    """counts: of all sampled requests, the first of which are those with drafts."""
    token_ids = np.array([i for draft in drafts for i in draft], np.int64)
    sampled = [(i, draft) for i, draft in enumerate(drafts) if isinstance(draft, SampledTokens)]
    if not sampled:
        return Drafts(counts, token_ids)
    starts = np.cumsum(counts) - counts
    places = np.concatenate([np.arange(starts[i], starts[i] + len(draft)) for i, draft in sampled])
    width = max(draft.candidates.shape[1] for _, draft in sampled)
    candidates, chances = np.zeros((len(places), width), np.int64), np.zeros((len(places), width), np.float32)
    first = 0
    for _, draft in sampled:
        end, k = first + len(draft), draft.candidates.shape[1]
        candidates[first:end, :k], chances[first:end, :k] = draft.candidates, draft.chances
        first = end
    return Drafts(counts, token_ids, DraftChances(places, candidates, chances))
