"""Medians, and how far they can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

_RESAMPLES = 10_000
_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A median with the limits of its bootstrap interval, and the number of values behind it."""

    median: float
    low: float
    high: float
    count: int

    @property
    def width(self) -> float:
        """From limit to limit."""
        return self.high - self.low


def bootstrap_median(values: Sequence[float], seed: int = 0) -> Interval:
    """The median with its 95 % percentile interval over resamples of the values; the same for the same seed.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    given = np.asarray(values, dtype=np.float64)
    assert given.size, "no values"
    chosen = np.random.default_rng(seed).integers(0, given.size, (_RESAMPLES, given.size))
    medians = np.median(given[chosen], axis=1)
    low, high = np.quantile(medians, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(np.median(given)), float(low), float(high), given.size)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The ratio of values taken in turn: of each pair first, so that a drift of the machine drops out."""
    return bootstrap_median([a / b for a, b in zip(ours, theirs, strict=True)])


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(median(values), min(values), max(values))
