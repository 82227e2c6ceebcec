"""What the sampler remembers of each row about its tokens where these are drawn on a device: it remembers them there,
so that the host need not know a token before the next one is drawn. The host's twins: row_tables and dry."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.dry import MAX_MATCH, penalty_table
from serve_app.engine.logits_ops import Ints, TorchLogits
from serve_app.options import DryParams, SamplingParams

MATCH_ELEMENTS = 1 << 25
"""How many pairs of tokens are compared at once while repetitions are looked for."""


class DevicePenalties:
    """See row_tables.PenaltyRows. Counts are as wide as the vocabulary: a step goes through those of its rows."""

    def __init__(self, ops: TorchLogits, max_rows: int, vocab_size: int) -> None:
        self._ops = ops
        self._shape = (max_rows, vocab_size)
        # 0: not seen, 1: in the prompt only, k + 1: put out k times. Made when the first row asks for it.
        self._counts: Tensor | None = None
        # Columns: presence, frequency, repetition.
        self._penalty = np.zeros((max_rows, 3), np.float32)

    def set_row(self, row: int, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Starts the row's counts."""
        self._penalty[row] = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._ops.device)
        output, times = np.unique(np.array(output_ids, np.int64), return_counts=True)
        ids = np.concatenate([np.array(prompt_ids, np.int64), output])
        counts = np.concatenate([np.ones(len(prompt_ids), np.int32), times.astype(np.int32) + 1])
        # One after the other: a token of the prompt may be named many times, and again in the output.
        mine = self._counts[row].zero_()
        for part in (slice(0, len(prompt_ids)), slice(len(prompt_ids), None)):
            mine[self._ops.tensor(ids[part])] = self._ops.tensor(counts[part])

    def copy_row(self, src: int, dst: int) -> None:
        """For a fork."""
        self._penalty[dst] = self._penalty[src]
        if self._counts is not None:
            self._counts[dst] = self._counts[src]

    def add(self, rows: Ints, token_ids: Tensor) -> None:
        """Counts one drawn token of each row."""
        assert self._counts is not None
        at = (self._ops.tensor(rows), token_ids)
        self._counts[at] = self._counts[at].clamp_(min=1) + 1

    def change(self, logits: Tensor, who: Ints, rows: Ints) -> None:
        """Subtracts and divides, in the rows who of logits, which are `rows` here."""
        assert self._counts is not None
        index = self._ops.tensor(who)
        counts = self._counts.index_select(0, self._ops.tensor(rows))
        presence, frequency, repetition = self._ops.tensor(self._penalty[rows].T.copy()).unsqueeze(2).unbind()
        times = (counts - 1).clamp_(min=0).float()
        before = logits.index_select(0, index)
        some = before - (frequency * times + presence * (times > 0))
        after = torch.where(some > 0, some / repetition, some * repetition)
        logits.index_copy_(0, index, torch.where(counts > 0, after, before))


class DeviceDry:
    """See dry.DryHistory. How many tokens a row has is known to the host, which tokens they are is not."""

    def __init__(self, ops: TorchLogits, max_rows: int, vocab_size: int) -> None:
        self._ops = ops
        self._lengths = np.zeros(max_rows, np.int64)
        # What a repetition of 0 to MAX_MATCH tokens costs.
        self._costs = np.zeros((max_rows, MAX_MATCH + 1), np.float32)
        self._tokens = torch.zeros(max_rows, 0, dtype=torch.int32, device=ops.device)
        self._shape = (max_rows, vocab_size)
        self._is_breaker: Tensor | None = None

    def set_row(self, row: int, params: DryParams, token_ids: Sequence[int], breaker_ids: Sequence[int]) -> None:
        """Starts the row with prompt and output so far."""
        if self._is_breaker is None:
            self._is_breaker = torch.zeros(self._shape, dtype=torch.bool, device=self._ops.device)
        count = len(token_ids)
        self._widen(count + 1)
        self._tokens[row, :count] = self._ops.tensor(np.array(token_ids, np.int32))
        self._lengths[row] = count
        self._costs[row] = penalty_table(params)
        mine = self._is_breaker[row].zero_()
        mine[self._ops.tensor(np.array(breaker_ids, np.int64))] = True

    def copy_row(self, src: int, dst: int) -> None:
        """For a fork."""
        assert self._is_breaker is not None
        self._lengths[dst], self._costs[dst] = self._lengths[src], self._costs[src]
        for table in (self._tokens, self._is_breaker):
            table[dst] = table[src]

    def add(self, rows: Ints, token_ids: Tensor) -> None:
        """Appends one drawn token to each row."""
        self._widen(int(self._lengths[rows].max()) + 1)
        at = (self._ops.tensor(rows), self._ops.tensor(self._lengths[rows]))
        self._tokens[at] = token_ids.int()
        self._lengths[rows] += 1

    def change(self, logits: Tensor, who: Ints, rows: Ints) -> None:
        """Subtracts from the rows who of logits, which are `rows` here."""
        width = int(self._lengths[rows].max())
        at_once = max(1, MATCH_ELEMENTS // (max(1, width) * MAX_MATCH))
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            index = self._ops.tensor(who[part])
            amounts = self._amounts(rows[part], width)
            logits.index_copy_(0, index, logits.index_select(0, index) - amounts)

    def _amounts(self, rows: Ints, width: int) -> Tensor:
        """What each token of the vocabulary costs [rows, vocabulary]."""
        assert self._is_breaker is not None
        index, lengths = self._ops.tensor(rows), self._ops.tensor(self._lengths[rows])
        is_breaker = self._is_breaker.index_select(0, index)
        tokens = self._tokens.index_select(0, index)[:, :width].long()
        # The row's last tokens, the very last one first. What ends a match is -1, which no token equals.
        back = lengths[:, None] - 1 - torch.arange(MAX_MATCH, device=tokens.device)
        tail = tokens.gather(1, back.clamp(min=0))
        tail = tail.masked_fill((back < 0) | is_breaker.gather(1, tail), -1)
        # In front of the first token -2, which none equals either.
        before = torch.nn.functional.pad(tokens, (MAX_MATCH - 1, 0), value=-2)
        is_same = before.unfold(1, MAX_MATCH, 1) == tail.flip(1)[:, None]
        counts_back = torch.arange(MAX_MATCH - 1, -1, -1, dtype=torch.int16, device=tokens.device)
        matched = torch.where(is_same, MAX_MATCH, counts_back).amin(dim=2).long()
        following = tokens.roll(-1, dims=1)
        is_end = torch.arange(width, device=tokens.device) < lengths[:, None] - 1
        matched = torch.where(is_end & ~is_breaker.gather(1, following), matched, 0)
        longest = torch.zeros(is_breaker.shape, dtype=torch.int64, device=tokens.device)
        longest.scatter_reduce_(1, following, matched, "amax")
        return self._ops.tensor(self._costs[rows]).gather(1, longest)

    def _widen(self, width: int) -> None:
        have = self._tokens.shape[1]
        if width > have:
            more = max(width, 2 * have, 16) - have
            self._tokens = torch.nn.functional.pad(self._tokens, (0, more))
