"""DRY: tokens that would continue a repetition of the row's own text are penalised, the longer the match the more.

Source: p-e-w's description of the method ("Don't Repeat Yourself", text-generation-webui pull request 5677); limits
as in mistral.rs: a match counts up to 50 tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.engine.logits_ops import Floats, HostLogits, Ints
from serve_app.engine.row_tables import widened
from serve_app.options import DryParams

MAX_MATCH = 50
MAX_PENALTY = 1e30


def penalty_table(params: DryParams) -> NDArray[np.float32]:
    """What a repetition of 0 to MAX_MATCH tokens costs [MAX_MATCH + 1]; nothing below the allowed length."""
    matched = np.arange(MAX_MATCH + 1)
    excess = np.maximum(matched - params.allowed_length, 0)
    with np.errstate(over="ignore"):
        amounts = params.multiplier * np.float64(params.base) ** excess
    counts = (matched > 0) & (matched >= params.allowed_length)
    return np.where(counts, np.minimum(amounts, MAX_PENALTY), 0.0).astype(np.float32)


class DryHistory:
    """Prompt and output of the rows that use DRY, on the host."""

    def __init__(self, ops: HostLogits, max_rows: int, vocab_size: int) -> None:
        self._ops = ops
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._lengths = np.zeros(max_rows, np.int64)
        self._costs = np.zeros((max_rows, MAX_MATCH + 1), np.float32)
        self._tokens: NDArray[np.int32] = np.zeros((max_rows, 0), np.int32)
        self._is_breaker: NDArray[np.bool_] = np.zeros((0, 0), np.bool_)

    def set_row(self, row: int, params: DryParams, token_ids: Sequence[int], breaker_ids: Sequence[int]) -> None:
        """Starts the row with prompt and output so far."""
        if not len(self._is_breaker):
            self._is_breaker = np.zeros((self._max_rows, self._vocab_size), np.bool_)
        self._tokens = widened(self._tokens, len(token_ids) + 1)
        self._tokens[row, : len(token_ids)] = token_ids
        self._lengths[row] = len(token_ids)
        self._is_breaker[row] = False
        self._is_breaker[row, list(breaker_ids)] = True
        self._costs[row] = penalty_table(params)

    def copy_row(self, src: int, dst: int) -> None:
        """For a fork."""
        arrays: tuple[NDArray[Any], ...] = (self._tokens, self._lengths, self._is_breaker, self._costs)
        for array in arrays:
            array[dst] = array[src]

    def add(self, rows: Ints, token_ids: Ints) -> None:
        """Appends one drawn token to each row."""
        self._tokens = widened(self._tokens, int(self._lengths[rows].max()) + 1)
        self._tokens[rows, self._lengths[rows]] = token_ids
        self._lengths[rows] += 1

    def change(self, logits: Floats, who: Ints, rows: Ints) -> None:
        """Subtracts from the rows who of logits, which are `rows` here."""
        which, tokens, amounts = self.penalties(rows)
        self._ops.add(logits, who[which], tokens, -amounts)

    def penalties(self, rows: Ints) -> tuple[Ints, Ints, NDArray[np.float32]]:
        """What to subtract from the rows' logits: indexes into rows, token ids, amounts; no pair twice."""
        lengths = self._lengths[rows]
        width = int(lengths.max()) if len(rows) else 0
        tokens = self._tokens[rows, :width].astype(np.int64)
        last = tokens[np.arange(len(rows)), np.maximum(lengths - 1, 0)]
        is_active = (lengths > 1) & ~self._is_breaker[rows, last]
        is_start = (tokens == last[:, None]) & (np.arange(width) < lengths[:, None] - 1) & is_active[:, None]
        which, ends = np.nonzero(is_start)
        following = tokens[which, ends + 1]
        is_open = ~self._is_breaker[rows[which], following]
        which, ends, following = which[is_open], ends[is_open], following[is_open]
        lengths_of_match = self._match(rows, tokens, lengths, which, ends)

        pairs, group = np.unique(which * self._vocab_size + following, return_inverse=True)
        longest = np.zeros(len(pairs), np.int64)
        np.maximum.at(longest, group, lengths_of_match)
        which, following = np.divmod(pairs, self._vocab_size)
        amounts = self._costs[rows[which], longest]
        counts = amounts != 0
        return which[counts], following[counts], amounts[counts]

    def _match(self, rows: Ints, tokens: Ints, lengths: Ints, which: Ints, ends: Ints) -> Ints:
        """How many tokens before and at each end equal the row's last tokens; all candidates a token at a time."""
        matched = np.ones(len(ends), np.int64)
        alive = np.arange(len(ends))
        for back in range(1, MAX_MATCH):
            alive = alive[ends[alive] >= back]
            row = which[alive]
            wanted = tokens[row, lengths[row] - 1 - back]
            is_same = (tokens[row, ends[alive] - back] == wanted) & ~self._is_breaker[rows[row], wanted]
            alive = alive[is_same]
            if not len(alive):
                break
            matched[alive] += 1
        return matched
