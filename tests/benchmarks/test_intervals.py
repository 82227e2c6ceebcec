"""Medians and their intervals."""

import numpy as np
import pytest

from benchmarks.cpu_speed.intervals import bootstrap_median, paired_ratio, spread


def test_equal_values_have_an_interval_without_width() -> None:
    found = bootstrap_median([2.0] * 15)
    assert (found.median, found.low, found.high, found.count) == (2.0, 2.0, 2.0, 15)
    assert found.width == 0


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [bootstrap_median(rng.normal(5.0, 1.0, 15), seed) for seed in range(120)]
    covered = sum(f.low <= 5.0 <= f.high for f in found) / len(found)
    assert 0.88 <= covered <= 1.0


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [1.0, 1.1, 0.9, 1.3, 1.05]
    assert bootstrap_median(values) == bootstrap_median(values)
    assert bootstrap_median(values).low <= 1.05 <= bootstrap_median(values).high


def test_a_drift_that_both_share_drops_out_of_a_paired_ratio() -> None:
    drift = [1.0, 2.0, 0.5, 4.0, 1.5]
    ratio = paired_ratio([1.2 * d for d in drift], drift)
    assert ratio.median == pytest.approx(1.2)
    assert ratio.width == pytest.approx(0.0)


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0, 2.0], [1.0])


def test_spread() -> None:
    found = spread([3.0, 1.0, 2.0])
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)
