"""What the sampler remembers of each row about single tokens: lists of ids, never anything as wide as the vocabulary
that has to be gone through in a step."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from serve_app.engine.logits_ops import Floats, HostLogits, Ints
from serve_app.options import SamplingParams

ArrayType = TypeVar("ArrayType", bound=np.generic)


class SparseRows:
    """An amount to add to some tokens' logits, for each row its own: logit biases, forbidden tokens."""

    def __init__(self, max_rows: int) -> None:
        self._lengths = np.zeros(max_rows, np.int64)
        self._ids = np.zeros((max_rows, 0), np.int64)
        self._amounts = np.zeros((max_rows, 0), np.float32)

    def set_row(self, row: int, ids: Sequence[int], amounts: Sequence[float] | float) -> None:
        """Replaces the row's list."""
        count = len(ids)
        self._ids = widened(self._ids, count)
        self._amounts = widened(self._amounts, count)
        self._lengths[row] = count
        self._ids[row] = 0
        self._amounts[row] = 0
        self._ids[row, :count] = ids
        self._amounts[row, :count] = amounts

    def copy_row(self, src: int, dst: int) -> None:
        """For a fork."""
        for array in (self._lengths, self._ids, self._amounts):
            array[dst] = array[src]

    def lists(self, rows: Ints) -> tuple[Ints, Floats]:
        """ids and amounts [len(rows), longest]; shorter rows go on with 0 added to token 0."""
        longest = int(self._lengths[rows].max())
        return self._ids[rows, :longest], self._amounts[rows, :longest]


class PenaltyRows:
    """Which tokens a row's prompt and output hold, and how often each was put out: for the OpenAI-style penalties."""

    def __init__(self, ops: HostLogits, max_rows: int, vocab_size: int) -> None:
        self._ops = ops
        self._lengths = np.zeros(max_rows, np.int64)
        self._seen = np.zeros((max_rows, 0), np.int64)
        # 0: not seen, 1: in the prompt only, k + 1: put out k times. Rows without penalties never touch their pages.
        self._counts = np.zeros((max_rows, vocab_size), np.int32)
        # Columns: presence, frequency, repetition.
        self._penalty = np.zeros((max_rows, 3), np.float32)

    def set_row(self, row: int, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Starts the row's counts."""
        self._penalty[row] = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        counts = self._counts[row]
        counts[self._seen[row, : self._lengths[row]]] = 0
        output = np.array(output_ids, np.int64)
        seen = np.union1d(np.array(prompt_ids, np.int64), output)
        self._seen = widened(self._seen, len(seen) + 1)
        self._seen[row, : len(seen)] = seen
        self._lengths[row] = len(seen)
        counts[seen] = 1
        np.add.at(counts, output, 1)

    def copy_row(self, src: int, dst: int) -> None:
        """For a fork."""
        self._counts[dst, self._seen[dst, : self._lengths[dst]]] = 0
        for array in (self._lengths, self._seen, self._penalty):
            array[dst] = array[src]
        seen = self._seen[src, : self._lengths[src]]
        self._counts[dst, seen] = self._counts[src, seen]

    def add(self, rows: Ints, token_ids: Ints) -> None:
        """Counts one drawn token of each row."""
        before = self._counts[rows, token_ids]
        self._counts[rows, token_ids] = np.maximum(before, 1) + 1
        is_new = before == 0
        some = rows[is_new]
        if len(some):
            self._seen = widened(self._seen, int(self._lengths[some].max()) + 1)
            self._seen[some, self._lengths[some]] = token_ids[is_new]
            self._lengths[some] += 1

    def change(self, logits: Floats, who: Ints, rows: Ints) -> None:
        """Subtracts and divides, in the rows who of logits, which are `rows` here."""
        self._ops.penalise(logits, who, *self.lists(rows))

    def lists(self, rows: Ints) -> tuple[Ints, Floats, Floats]:
        """ids [s, longest] of the tokens seen, what to subtract from their logits [s, longest], and the repetition
        penalty [s, 1]. Shorter rows repeat their first token, with the same numbers."""
        lengths = self._lengths[rows]
        longest = int(lengths.max())
        ids = self._seen[rows, :longest]
        ids = np.where(np.arange(longest) < lengths[:, None], ids, ids[:, :1])
        counts = (self._counts[rows[:, None], ids] - 1).astype(np.float32)
        presence, frequency, repetition = self._penalty[rows].T[..., None]
        return ids, frequency * counts + presence * (counts > 0), repetition


def widened(array: NDArray[ArrayType], width: int) -> NDArray[ArrayType]:
    """The array [rows, have], with zeros up to at least width columns where it is narrower."""
    have = array.shape[1]
    if width <= have:
        return array
    grown = np.zeros((array.shape[0], max(width, 2 * have, 16)), array.dtype)
    grown[:, :have] = array
    return grown


def needs_penalties(params: SamplingParams) -> bool:
    """Whether any of the three is on."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1
