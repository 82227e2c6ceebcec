"""What a step of the target and a proposal cost, learnt from what they took."""

from bisect import bisect_left
from math import sqrt

import numpy as np
from numpy.typing import NDArray

# Exact up to 16 tokens, then eight an octave.
_BUCKETS: list[int] = [
    *range(1, 17),
    *(16 * 2**octave * (8 + part) // 8 for octave in range(13) for part in range(1, 9)),
]
# An average remembers about so many steps; what is far off counts only when it happens again.
_MEMORY = 16
_WARM_UP_WEIGHT = 16
_MOST_OFF = 1.5
_MOST_AT_FIRST = 4.0
_NUM_STRANGE = 3
# What one measurement may be wrong by: taken off, so that what looks dear by accident is tried again.
_UNCERTAINTY = 0.05
# So much of a deviation is taken to be that of all buckets: the machine's, or that of longer contexts.
_SHARED = 0.5
_STEPS_A_TABLE = 8
# After so many steps a bucket weighs half: one that was measured badly and since then avoided is tried again.
_STEPS_A_HALVING = 128


class StepTimes:
    """Seconds of a step of the target, by the number of tokens that it computes."""

    def __init__(self) -> None:
        self._shapes = [0.0] * len(_BUCKETS)
        self._weights = [0.0] * len(_BUCKETS)
        self._num_strange = [0] * len(_BUCKETS)
        self._scale = 1.0
        self._num_noted = 0
        self._table: list[float] = []
        self._is_stale = True

    @property
    def is_known(self) -> bool:
        """Whether any step was noted."""
        return self._num_noted > 0

    def warm_up(self, num_tokens: int, seconds: float) -> None:
        """What a step took when nothing else was to do: weighs as several."""
        bucket = _bucket(num_tokens)
        self._shapes[bucket] = seconds / self._scale
        self._weights[bucket] = _WARM_UP_WEIGHT
        self._num_noted += 1
        self._is_stale = True

    def note(self, num_tokens: int, seconds: float) -> bool:
        """What a step took. True where nothing was known of about as many tokens, or something quite else."""
        bucket = _bucket(num_tokens)
        weight = self._weights[bucket]
        if not self.is_known:
            self._shapes[bucket] = seconds / self._scale
        elif not weight:
            # One that was not measured lately: its neighbours count as much as one measurement that is not far off, and
            # several times what they say is not believed at once.
            expected = self.table(max(num_tokens, _BUCKETS[bucket]))
            ratio = seconds / expected[num_tokens]
            ratio = sqrt(ratio) if 1 / _MOST_OFF < ratio < _MOST_OFF else min(ratio, _MOST_AT_FIRST)
            self._shapes[bucket] = ratio * expected[_BUCKETS[bucket]] / self._scale
            self._is_stale = True
        else:
            self._correct(bucket, weight, num_tokens, seconds)
        self._weights[bucket] = min(weight + 1, _MEMORY)
        self._num_noted += 1
        self._is_stale |= self._num_noted % _STEPS_A_TABLE == 0 or self._num_noted < 64
        if self._num_noted % _STEPS_A_HALVING == 0:
            halves = [weight / 2 for weight in self._weights]
            half_as_many = self._known_half(bucket)
            self._weights = [half if half >= 1 or i == bucket else 0.0 for i, half in enumerate(halves)]
            if half_as_many is not None:
                self._weights[half_as_many] = max(1.0, halves[half_as_many])
            self._is_stale = True
        return not weight or self._num_strange[bucket] > 0

    def _known_half(self, bucket: int) -> int | None:
        """The largest known bucket of at most half as many tokens. The slope from there on says what more
        tokens cost; without it they would seem to cost nothing."""
        halves = (i for i in range(bucket, -1, -1) if 2 * _BUCKETS[i] <= _BUCKETS[bucket] and self._weights[i])
        return next(halves, None)

    def table(self, num_tokens: int) -> list[float]:
        """Seconds by number of tokens, 0 to num_tokens at least; never falling. Only once any step was noted."""
        if self._is_stale or len(self._table) <= num_tokens:
            self._table = self._computed(max(num_tokens, len(self._table) - 1)).tolist()
            self._is_stale = False
        return self._table

    def _correct(self, bucket: int, weight: float, num_tokens: int, seconds: float) -> None:
        expected = self._shapes[bucket] * self._scale
        if num_tokens != _BUCKETS[bucket]:
            table = self.table(max(num_tokens, _BUCKETS[bucket]))
            expected *= table[num_tokens] / table[_BUCKETS[bucket]]
        ratio = seconds / expected
        if 1 / _MOST_OFF < ratio < _MOST_OFF:
            self._num_strange[bucket] = 0
        else:
            self._num_strange[bucket] += 1
            if self._num_strange[bucket] < _NUM_STRANGE:
                ratio = min(max(ratio, 1 / _MOST_OFF), _MOST_OFF)
        # A bucket that looks dear is avoided, and stays so: its first few measurements raise it but slowly.
        young = 1 if ratio < 1 or self._num_strange[bucket] >= _NUM_STRANGE else _MEMORY / 2
        rate = 1 / min(max(weight + 1, young), _MEMORY)
        shared = ratio ** (_SHARED / _MEMORY)
        self._scale *= shared
        self._shapes[bucket] *= ratio**rate / shared

    def _computed(self, num_tokens: int) -> NDArray[np.float64]:
        known = [i for i, weight in enumerate(self._weights) if weight]
        at = np.array([_BUCKETS[i] for i in known], np.float64)
        weights = [self._weights[i] for i in known]
        likely = [
            self._shapes[i] * self._scale * (1 - _UNCERTAINTY / sqrt(weight))
            for i, weight in zip(known, weights, strict=True)
        ]
        seconds = np.array(_never_falling(likely, weights))
        tokens = np.arange(num_tokens + 1, dtype=np.float64)
        right = np.searchsorted(at, tokens).clip(0, len(at) - 1)
        left = np.maximum(right - 1, 0)
        # Between two that are known, time is flat until it is proportional, as where first memory and then arithmetic
        # bounds it: a straight line would say that few tokens beside few are dear because many are.
        times: NDArray[np.float64] = np.maximum(seconds[left], seconds[right] * np.minimum(tokens / at[right], 1))
        # What is fewer than ever computed may be as much cheaper: it is tried, and then known.
        fewer = tokens < at[0]
        times[fewer] = seconds[0] * tokens[fewer] / at[0]
        beyond = tokens > at[-1]
        if beyond.any():
            # With the slope since half as many tokens; neighbours' noise would make it any.
            half = int(np.searchsorted(at, at[-1] / 2, side="right")) - 1
            slope = (seconds[-1] - seconds[half]) / (at[-1] - at[half]) if half >= 0 else 0.0
            times[beyond] = seconds[-1] + slope * (tokens[beyond] - at[-1])
        return times


class ProposalTimes:
    """Seconds of one proposer's proposals: for each width of the batch (a power of two) a + b * depth."""

    def __init__(self) -> None:
        self._fits: list[_Line] = []

    def note(self, num_sequences: int, depth: int, seconds: float) -> bool:
        """What it took to propose at most depth tokens for each of so many sequences. True where nothing was known of
        about as many, or something quite else."""
        width = (num_sequences - 1).bit_length()
        while len(self._fits) <= width:
            self._fits.append(_Line())
        for fit in self._fits:
            # One bad measurement of a width that is avoided from then on must not last.
            fit.age()
        return self._fits[width].note(depth, seconds)

    def line(self, num_sequences: int) -> tuple[float, float]:
        """a, b; of the nearest width that was noted, zeros where none was."""
        width = (num_sequences - 1).bit_length()
        known = [i for i, fit in enumerate(self._fits) if fit.is_known]
        if not known:
            return 0.0, 0.0
        if width < len(self._fits) and self._fits[width].is_known:
            return self._fits[width].line
        return self._fits[min(known, key=lambda i: abs(i - width))].line


class _Line:
    """A straight line through what was noted lately; proportional to the depth where only one depth was."""

    _KEPT = 0.9
    _FAR = 3.0
    _MOST_OTHERS = 4

    def __init__(self) -> None:
        self.line = 0.0, 0.0
        self._sums = [0.0] * 5
        self._was_far = False
        self._num_others = 0

    @property
    def is_known(self) -> bool:
        return self._sums[0] > 0

    def age(self) -> None:
        """Something else was noted: after a few times what is known here, by one measurement or ten, is forgotten."""
        self._num_others += 1
        if self._num_others > self._MOST_OTHERS * self._sums[0]:
            self._sums = [0.0] * 5

    def note(self, depth: int, seconds: float) -> bool:
        self._num_others = 0
        is_strange = not self.is_known
        if self.is_known:
            expected = self.line[0] + self.line[1] * depth
            is_far = not expected / self._FAR <= seconds <= expected * self._FAR
            if is_far and self._was_far:
                # Twice is no accident: what was before is over.
                self._sums = [0.0] * 5
            elif is_far:
                seconds = min(max(seconds, expected / self._FAR), expected * self._FAR)
            self._was_far = is_strange = is_far
        new = 1.0, depth, seconds, depth * depth, depth * seconds
        self._sums = [self._KEPT * old + term for old, term in zip(self._sums, new, strict=True)]
        weight, depths, times, squares, products = self._sums
        mean_depth, mean = depths / weight, times / weight
        variance = max(0.0, squares / weight - mean_depth * mean_depth)
        covariance = products / weight - mean_depth * mean
        proportional = mean / mean_depth
        slope = (covariance + 0.1 * proportional) / (variance + 0.1)
        slope = min(max(slope, 0.0), proportional)
        self.line = mean - slope * mean_depth, slope
        return is_strange


def _bucket(num_tokens: int) -> int:
    """The nearest one."""
    if num_tokens <= 16:
        return max(num_tokens, 1) - 1
    right = min(bisect_left(_BUCKETS, num_tokens), len(_BUCKETS) - 1)
    is_left_nearer = num_tokens - _BUCKETS[right - 1] < _BUCKETS[right] - num_tokens
    return right - 1 if is_left_nearer else right


def _never_falling(values: list[float], weights: list[float]) -> list[float]:
    """The nearest sequence that never falls: neighbours that do are given their mean (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        size = 1
        while blocks and blocks[-1][0] >= value:
            before, its_weight, its_size = blocks.pop()
            value = (before * its_weight + value * weight) / (its_weight + weight)
            weight += its_weight
            size += its_size
        blocks.append((value, weight, size))
    return [value for value, _, size in blocks for _ in range(size)]
