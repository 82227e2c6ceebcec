"""Logits to token ids, for all rows at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import dispatch
from serve_app.engine.device_rows import DeviceDry, DevicePenalties
from serve_app.engine.dry import DryHistory
from serve_app.engine.logits_ops import (
    Fetch,
    Fetched,
    HostLogits,
    Ids,
    Ints,
    Logits,
    LogitsOps,
    Parameters,
    Proposed,
    TorchLogits,
)
from serve_app.engine.row_tables import PenaltyRows, SparseRows, needs_penalties
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


class Draw:
    """What a call of the sampler drew: token_ids [S] int64, where the logits were, and on the host when they are there.

    token_ids may be read by the next step at once; wait() blocks until they have come to the host.
    """

    def __init__(self, token_ids: Ids, fetch: Fetch, asked: Ints) -> None:
        """fetch: of token_ids, and of the log-probabilities of the rows `asked` if there are any."""
        self.token_ids = token_ids
        self._fetch = fetch
        self._asked = asked

    def wait(self) -> Sampled:
        """See Sampled."""
        token_ids, *logprobs = self._fetch.wait()
        return Sampled(token_ids, self._logprobs(len(token_ids), *logprobs) if logprobs else None)

    def _logprobs(
        self, count: int, chosen: NDArray[np.float32], top_ids: Ints, top_logprobs: NDArray[np.float32]
    ) -> StepLogprobs:
        k = top_ids.shape[1]
        result = StepLogprobs(
            np.full(count, np.nan, np.float32),
            np.full((count, k), -1, np.int64),
            np.full((count, k), np.nan, np.float32),
        )
        result.chosen[self._asked] = chosen
        result.top_ids[self._asked] = top_ids
        result.top_logprobs[self._asked] = top_logprobs
        return result


class Sampler:
    """Persistent per-row parameters and one vectorised draw for all rows of a step.

    On the CPU, with native kernels, all of it are arrays of the host; elsewhere logits, ids and what is remembered of
    them are tensors of the device, and nothing waits for it, except for masks: an automaton on the host must know the
    last token before it can tell which may follow.

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
        *,
        is_native: bool = True,
    ) -> None:
        """eos_ids are what min_tokens forbids (with params.stop_token_ids).

        breaker_ids gives the token ids that a DRY sequence breaker string stands for (those whose text contains it).
        is_native: on the CPU native kernels do the work, where there are any, and else plain torch.
        """
        self.vocab_size = vocab_size
        self.max_rows = max_rows
        self._eos_ids = tuple(eos_ids)
        self._breaker_ids = breaker_ids
        device = torch.device(device)
        self._is_on_device = device.type != "cpu"
        has_native = is_native and device.type == "cpu" and dispatch.native().ops is not None
        self._needs = np.zeros(max_rows, np.int64)
        self._temperature = np.zeros(max_rows, np.float32)
        self._top_k = np.zeros(max_rows, np.int64)
        self._top_p = np.ones(max_rows)
        self._min_p = np.zeros(max_rows)
        self._seed = np.zeros(max_rows, np.uint64)
        self._min_until = np.zeros(max_rows, np.int64)
        self._num_logprobs = np.zeros(max_rows, np.int64)
        self._ops: LogitsOps
        self._penalties: PenaltyRows | DevicePenalties
        self._dry: DryHistory | DeviceDry
        if has_native:
            self._ops = host = HostLogits()
            self._penalties = PenaltyRows(host, max_rows, vocab_size)
            self._dry = DryHistory(host, max_rows, vocab_size)
        else:
            self._ops = there = TorchLogits(device)
            self._penalties = DevicePenalties(there, max_rows, vocab_size)
            self._dry = DeviceDry(there, max_rows, vocab_size)
        self._bias = SparseRows(max_rows)
        self._too_early = SparseRows(max_rows)
        self._masks: dict[int, TokenMask] = {}
        # Masks that still have to hear of the token drawn last: row, automaton, index into that draw.
        self._unheard: list[tuple[int, TokenMask, int]] = []
        self._last_draw: Fetch | None = None
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
        self._bias.copy_row(src, dst)
        self._too_early.copy_row(src, dst)
        if self._needs[src] & Need.PENALTY:
            self._penalties.copy_row(src, dst)
        if self._needs[src] & Need.DRY:
            self._dry.copy_row(src, dst)
        self._tell_masks()
        self._masks.pop(dst, None)
        if src in self._masks:
            self._masks[dst] = self._masks[src].fork()

    def draws_freely(self, rows: Ints) -> NDArray[np.bool_]:
        """Of which rows tokens of several positions may be drawn in one call: nothing that is drawn changes what comes
        after it. On the host only where a draw is so cheap that it may be in vain."""
        ties = Need.MEMORY if self._is_on_device else Need.MEMORY | Need.RANDOM
        are_free: NDArray[np.bool_] = (self._needs[rows] & ties) == 0
        return are_free

    def is_random(self, rows: Ints) -> NDArray[np.bool_]:
        """Which rows are not greedy."""
        are_random: NDArray[np.bool_] = (self._needs[rows] & Need.RANDOM) > 0
        return are_random

    def sample(
        self, logits: Logits, rows: Ints, positions: Ints, proposed: tuple[Ints, Proposed] | None = None
    ) -> Draw:
        """Draws one token for each row and updates the rows' states with it.

        logits [S, vocab_size] float32, an array of the host or a tensor on the device (overwritten), rows [S] without
        repetition but of those that draw freely, positions [S] of the tokens to be drawn: the random number is a
        function of the row's seed and the position alone. proposed: indexes into rows that are not greedy, and for each
        a token that was sampled from another distribution: it is drawn, or another one, so that what is drawn is of the
        row's own distribution (kernels.reference.sampling.accept_or_draw).
        """
        ops = self._ops
        logits = ops.own(logits)
        needs = self._needs[rows]
        if not needs.any():
            token_ids = ops.likeliest(logits)
            return Draw(token_ids, ops.fetch([token_ids]), rows)
        asked = np.flatnonzero(needs & Need.LOGPROBS)
        # A copy, as logits change from here on.
        raw = ops.copy(logits, asked) if len(asked) else None
        if (needs & Need.CHANGES).any():
            self._change_logits(logits, rows, positions, needs)
        if proposed is None:
            token_ids = self._draw(logits, rows, positions, needs)
        else:
            token_ids = self._accept_or_draw(logits, rows, positions, needs, *proposed)
        results = [token_ids]
        if raw is not None:
            results += ops.logprobs(raw, ops.pick(token_ids, asked), int(self._num_logprobs[rows[asked]].max()))
        fetch = ops.fetch(results)
        if (needs & Need.MEMORY).any():
            self._advance(rows, token_ids, needs, fetch)
        return Draw(token_ids, fetch, asked)

    def _change_logits(self, logits: Any, rows: Ints, positions: Ints, needs: Ints) -> None:
        """Everything before the temperature, in place, each on the rows that asked for it."""
        ops = self._ops
        if len(who := np.flatnonzero(needs & Need.DRY)):
            self._dry.change(logits, who, rows[who])
        if len(who := np.flatnonzero(needs & Need.PENALTY)):
            self._penalties.change(logits, who, rows[who])
        if len(who := np.flatnonzero(needs & Need.BIAS)):
            ops.add(logits, who[:, None], *self._bias.lists(rows[who]))
        is_early = (needs & Need.MIN_TOKENS > 0) & (positions < self._min_until[rows])
        if len(who := np.flatnonzero(is_early)):
            ops.add(logits, who[:, None], *self._too_early.lists(rows[who]))
        if len(who := np.flatnonzero(needs & Need.MASK)):
            self._tell_masks()
            # Each automaton fills its own words: the only loop over rows.
            for row in rows[who].tolist():
                self._masks[row].fill(self._mask_bits[row])
            ops.forbid(logits, who, self._mask_bits[rows[who]])

    def _draw(self, logits: Any, rows: Ints, positions: Ints, needs: Ints) -> Any:
        if not (needs & Need.RANDOM).any():
            return self._ops.likeliest(logits)
        return self._ops.draw(logits, self._seed[rows], positions, self._parameters(rows))

    def _accept_or_draw(
        self, logits: Any, rows: Ints, positions: Ints, needs: Ints, who: Ints, proposed: Proposed
    ) -> Any:
        ops, here = self._ops, rows[who]
        part = logits if len(who) == len(rows) else ops.copy(logits, who)
        token_ids = ops.accept_or_draw(part, self._seed[here], positions[who], self._parameters(here), proposed)
        others = np.delete(np.arange(len(rows)), who)
        if not len(others):
            return token_ids
        drawn = self._draw(ops.copy(logits, others), rows[others], positions[others], needs[others])
        return ops.joined([(who, token_ids), (others, drawn)])

    def _parameters(self, rows: Ints) -> Parameters:
        return self._temperature[rows], self._top_k[rows], self._top_p[rows], self._min_p[rows]

    def _advance(self, rows: Ints, token_ids: Any, needs: Ints, fetch: Fetch) -> None:
        """Tells what remembers tokens which were drawn."""
        if len(who := np.flatnonzero(needs & Need.PENALTY)):
            self._penalties.add(rows[who], self._ops.pick(token_ids, who))
        if len(who := np.flatnonzero(needs & Need.DRY)):
            self._dry.add(rows[who], self._ops.pick(token_ids, who))
        if len(who := np.flatnonzero(needs & Need.MASK)):
            self._tell_masks()
            self._unheard = [
                (row, self._masks[row], i) for row, i in zip(rows[who].tolist(), who.tolist(), strict=True)
            ]
            self._last_draw = fetch
            if isinstance(fetch, Fetched):
                self._tell_masks()

    def _tell_masks(self) -> None:
        """Waits for the last draw where masks have not heard of it: by now the device has the next forward to do."""
        if self._last_draw is None:
            return
        token_ids = self._last_draw.wait()[0]
        for row, mask, i in self._unheard:
            if self._masks.get(row) is mask:
                mask.advance(int(token_ids[i]))
        self._unheard, self._last_draw = [], None
