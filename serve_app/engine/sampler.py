"""Logits to token ids, for all rows at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.engine.dry import DryHistory
from serve_app.engine.logits_ops import HostLogits, Logits, LogitsOps, TorchLogits
from serve_app.engine.row_tables import Ints, PenaltyRows, SparseRows, needs_penalties
from serve_app.engine.token_mask import TokenMask
from serve_app.options import SamplingParams

GREEDY_BELOW = 1e-7


class Need(IntFlag):
    """What a row asks for beyond the likeliest token."""

    RANDOM = 1
    LOGPROBS = 2
    PENALTY = 4
    DRY = 8
    MASK = 16
    BIAS = 32
    MIN_TOKENS = 64
    MEMORY = PENALTY | DRY | MASK
    CHANGES = MEMORY | BIAS | MIN_TOKENS


@dataclass(slots=True)
class StepLogprobs:
    """Log-probabilities of the raw model distribution (before penalties, temperature and filters).

    chosen [S] float32, top_ids [S, k] int64 and top_logprobs [S, k] float32, best first; k is the largest that a row
    asked for. Rows that did not ask hold NaN and -1.
    """

    chosen: NDArray[np.float32]
    top_ids: Ints
    top_logprobs: NDArray[np.float32]


@dataclass(slots=True)
class Sampled:
    """token_ids [S] int64 on the host."""

    token_ids: Ints
    logprobs: StepLogprobs | None


class Sampler:
    """Persistent per-row parameters and one vectorised draw for all rows of a step.

    The order is: DRY, presence and frequency and repetition penalties, logit bias, min_tokens and token mask,
    temperature, top-k, top-p, min-p, draw. A temperature below 1e-7 takes the likeliest token.
    """

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        device: str | torch.device = "cpu",
        eos_ids: Sequence[int] = (),
        breaker_ids: Callable[[str], Sequence[int]] = lambda text: (),
    ) -> None:
        """eos_ids are what min_tokens forbids (with params.stop_token_ids).

        breaker_ids gives the token ids that a DRY sequence breaker string stands for (those whose text contains it).
        """
        self.vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._breaker_ids = breaker_ids
        self._torch_ops = TorchLogits(torch.device(device))
        self._host_ops: HostLogits | None = None
        self._needs = np.zeros(max_rows, np.int64)
        self._temperature = np.zeros(max_rows, np.float32)
        self._top_k = np.zeros(max_rows, np.int64)
        self._top_p = np.ones(max_rows)
        self._min_p = np.zeros(max_rows)
        self._seed = np.zeros(max_rows, np.uint64)
        self._min_until = np.zeros(max_rows, np.int64)
        self._num_logprobs = np.zeros(max_rows, np.int64)
        self._penalties = PenaltyRows(max_rows, vocab_size)
        self._bias = SparseRows(max_rows)
        self._too_early = SparseRows(max_rows)
        self._dry = DryHistory(max_rows, vocab_size)
        self._masks: dict[int, TokenMask] = {}
        self._mask_bits: NDArray[np.int32] = np.zeros((max_rows, -(-vocab_size // 32)), np.int32)

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int] = (),
        mask: TokenMask | None = None,
    ) -> None:
        """Gives the row to a choice: at admission, and again after a preemption with what it has put out so far.

        seed is any integer, taken modulo 2**64. mask stands after output_ids already; the sampler advances it.
        """
        needs = Need(0)
        is_random = params.temperature >= GREEDY_BELOW
        if is_random:
            needs |= Need.RANDOM
        self._temperature[row] = params.temperature if is_random else 0.0
        self._top_k[row] = min(params.top_k, self.vocab_size)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seed[row] = seed & 0xFFFFFFFFFFFFFFFF
        self._num_logprobs[row] = min(params.logprobs or 0, self.vocab_size)
        if params.logprobs is not None:
            needs |= Need.LOGPROBS
        if needs_penalties(params):
            needs |= Need.PENALTY
            self._penalties.set_row(row, params, prompt_ids, output_ids)
        if params.dry.multiplier > 0:
            needs |= Need.DRY
            breakers = [i for text in params.dry.sequence_breakers for i in self._breaker_ids(text)]
            self._dry.set_row(row, params.dry, [*prompt_ids, *output_ids], breakers)
        if params.logit_bias:
            needs |= Need.BIAS
            self._bias.set_row(row, [i for i, _ in params.logit_bias], [b for _, b in params.logit_bias])
        if params.min_tokens > 0:
            needs |= Need.MIN_TOKENS
            self._min_until[row] = len(prompt_ids) + params.min_tokens
            self._too_early.set_row(row, [*self._eos_ids, *params.stop_token_ids], float("-inf"))
        self._masks.pop(row, None)
        if mask is not None:
            needs |= Need.MASK
            self._masks[row] = mask
        self._needs[row] = needs

    def clear_row(self, row: int) -> None:
        """The row's choice ended or was preempted."""
        self._needs[row] = 0
        self._masks.pop(row, None)

    def fork_row(self, src: int, dst: int, seed: int) -> None:
        """Gives dst to another choice of src's request: same state, its own seed."""
        arrays: tuple[NDArray[np.generic], ...] = (
            self._needs, self._temperature, self._top_k, self._top_p, self._min_p, self._min_until,
            self._num_logprobs,
        )  # fmt: skip
        for array in arrays:
            array[dst] = array[src]
        self._seed[dst] = seed & 0xFFFFFFFFFFFFFFFF
        self._penalties.copy_row(src, dst)
        self._bias.copy_row(src, dst)
        self._too_early.copy_row(src, dst)
        if self._needs[src] & Need.DRY:
            self._dry.copy_row(src, dst)
        self._masks.pop(dst, None)
        if src in self._masks:
            self._masks[dst] = self._masks[src].fork()

    def sample(self, logits: Logits, rows: Ints, positions: Ints) -> Sampled:
        """Draws one token for each row and updates the rows' states with it.

        logits [S, vocab_size] float32, an array of the host or a tensor on the device (overwritten), rows [S] without
        repetition, positions [S] of the tokens to be drawn: the random number is a function of the row's seed and the
        position alone.
        """
        ops = self._ops_for(logits)
        needs = self._needs[rows]
        if not needs.any():
            return Sampled(ops.likeliest(logits), None)
        asked = np.flatnonzero(needs & Need.LOGPROBS)
        # A copy, as logits change from here on.
        raw = ops.copy(logits, asked) if len(asked) else None
        if (needs & Need.CHANGES).any():
            self._change_logits(ops, logits, rows, positions, needs)
        token_ids = self._draw(ops, logits, rows, positions, needs)
        if (needs & Need.MEMORY).any():
            self._advance(rows, token_ids, needs)
        logprobs = None if raw is None else self._logprobs(ops, raw, token_ids, asked, rows)
        return Sampled(token_ids, logprobs)

    def _ops_for(self, logits: Logits) -> LogitsOps:
        if isinstance(logits, Tensor):
            return self._torch_ops
        if self._host_ops is None:
            self._host_ops = HostLogits()
        return self._host_ops

    def _change_logits(self, ops: LogitsOps, logits: Logits, rows: Ints, positions: Ints, needs: Ints) -> None:
        """Everything before the temperature, in place, each on the rows that asked for it."""
        if len(who := np.flatnonzero(needs & Need.DRY)):
            which, tokens, amounts = self._dry.penalties(rows[who])
            ops.add(logits, who[which], tokens, -amounts)
        if len(who := np.flatnonzero(needs & Need.PENALTY)):
            ops.penalise(logits, who, *self._penalties.lists(rows[who]))
        if len(who := np.flatnonzero(needs & Need.BIAS)):
            ops.add(logits, who[:, None], *self._bias.lists(rows[who]))
        is_early = (needs & Need.MIN_TOKENS > 0) & (positions < self._min_until[rows])
        if len(who := np.flatnonzero(is_early)):
            ops.add(logits, who[:, None], *self._too_early.lists(rows[who]))
        if len(who := np.flatnonzero(needs & Need.MASK)):
            # Each automaton fills its own words: the only loop over rows.
            for row in rows[who].tolist():
                self._masks[row].fill(self._mask_bits[row])
            ops.forbid(logits, who, self._mask_bits[rows[who]])

    def _draw(self, ops: LogitsOps, logits: Logits, rows: Ints, positions: Ints, needs: Ints) -> Ints:
        if not (needs & Need.RANDOM).any():
            return ops.likeliest(logits)
        parameters = (self._temperature[rows], self._top_k[rows], self._top_p[rows], self._min_p[rows])
        return ops.draw(logits, self._seed[rows], positions, parameters)

    def _advance(self, rows: Ints, token_ids: Ints, needs: Ints) -> None:
        """Tells what remembers tokens which were drawn."""
        if len(who := np.flatnonzero(needs & Need.PENALTY)):
            self._penalties.add(rows[who], token_ids[who])
        if len(who := np.flatnonzero(needs & Need.DRY)):
            self._dry.add(rows[who], token_ids[who])
        if len(who := np.flatnonzero(needs & Need.MASK)):
            for row, token_id in zip(rows[who].tolist(), token_ids[who].tolist(), strict=True):
                self._masks[row].advance(token_id)

    def _logprobs(self, ops: LogitsOps, raw: Logits, ids: Ints, asked: Ints, rows: Ints) -> StepLogprobs:
        k = int(self._num_logprobs[rows[asked]].max())
        result = StepLogprobs(
            np.full(len(rows), np.nan, np.float32),
            np.full((len(rows), k), -1, np.int64),
            np.full((len(rows), k), np.nan, np.float32),
        )
        chosen, top_ids, top_logprobs = ops.logprobs(raw, ids[asked], k)
        result.chosen[asked] = chosen
        result.top_ids[asked] = top_ids
        result.top_logprobs[asked] = top_logprobs
        return result
