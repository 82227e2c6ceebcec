"""Times of steps and proposals, learnt from noisy ones."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.speculation.costs import ProposalTimes, StepTimes


@given(st.lists(st.tuples(st.integers(1, 3000), st.floats(1e-4, 10)), min_size=1, max_size=60))
def test_a_table_is_positive_and_never_falls(noted: list[tuple[int, float]]) -> None:
    times = StepTimes()
    for num_tokens, seconds in noted:
        times.note(num_tokens, seconds)
    table = times.table(4000)
    assert len(table) > 4000
    assert table[1] > 0
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(table))


def test_what_was_measured_comes_back_and_a_knee_between_is_not_feared() -> None:
    times = StepTimes()
    for num_tokens, seconds in ((1, 1.0), (32, 1.1), (512, 8.0)):
        times.warm_up(num_tokens, seconds)
    table = times.table(1024)
    assert [table[n] for n in (1, 32, 512)] == pytest.approx([1.0, 1.1, 8.0], rel=0.02)
    # As where memory bounds the step until arithmetic does.
    assert table[64] == pytest.approx(1.1, rel=0.02)
    assert table[256] == pytest.approx(4.0, rel=0.02)
    assert table[1024] == pytest.approx(8.0 + 512 * (8.0 - 1.1) / 480, rel=0.02)


def test_outliers_move_little_and_a_lasting_change_is_followed() -> None:
    generator = random.Random(3)
    times = StepTimes()
    for _ in range(200):
        accident = 20.0 if generator.random() < 0.02 else 1.0
        for num_tokens in (1, 4):
            times.note(num_tokens, (1 + 0.1 * num_tokens) * generator.lognormvariate(0, 0.05) * accident)
    assert times.table(4)[1] == pytest.approx(1.1, rel=0.08)
    assert times.table(4)[4] == pytest.approx(1.4, rel=0.08)
    for _ in range(60):
        times.note(1, 3.3)
        times.note(4, 4.2)
    assert times.table(4)[1] == pytest.approx(3.3, rel=0.05)
    assert times.table(4)[4] == pytest.approx(4.2, rel=0.05)


def test_a_number_that_is_not_computed_any_more_follows_the_others_in_part() -> None:
    times = StepTimes()
    for num_tokens, seconds in ((1, 1.0), (6, 1.2)):
        times.warm_up(num_tokens, seconds)
    for _ in range(100):
        times.note(6, 2.4)
    table = times.table(6)
    assert table[6] == pytest.approx(2.4, rel=0.05)
    assert 1.3 < table[1] < 2.4


def test_one_bad_measurement_does_not_last() -> None:
    """A first step of 64 tokens that took ten times as long, and then none: later it may be tried again."""
    times = StepTimes()
    for num_tokens in (32, 64):
        times.warm_up(num_tokens, 1.0)
    times.note(128, 10.0)
    assert times.table(128)[128] > 2
    for _ in range(600):
        times.note(32, 1.0)
    assert times.table(128)[128] < 1.1


def test_a_proposal_has_a_begin_and_a_price_by_depth_for_each_width() -> None:
    generator = random.Random(4)
    times = ProposalTimes()
    assert times.line(8) == (0.0, 0.0)
    for _ in range(100):
        for num_sequences, begin, each in ((1, 0.2, 0.1), (8, 0.4, 0.15)):
            depth = generator.randrange(1, 6)
            times.note(num_sequences, depth, (begin + each * depth) * generator.lognormvariate(0, 0.02))
    for num_sequences, begin, each in ((1, 0.2, 0.1), (7, 0.4, 0.15), (32, 0.4, 0.15)):
        found = times.line(num_sequences)
        for depth in (1, 3, 5):
            assert found[0] + found[1] * depth == pytest.approx(begin + each * depth, rel=0.1)


def test_one_depth_alone_is_taken_as_proportional() -> None:
    times = ProposalTimes()
    for _ in range(10):
        times.note(1, 4, 0.8)
    assert times.line(1) == pytest.approx((0.0, 0.2))


def test_one_late_answer_counts_little_and_two_are_believed() -> None:
    times = ProposalTimes()
    for _ in range(10):
        times.note(1, 1, 1.0)
    times.note(1, 1, 100.0)
    assert sum(times.line(1)) < 1.5
    times.note(1, 1, 100.0)
    assert sum(times.line(1)) == pytest.approx(100.0)
    times.note(1, 1, 1.0)
    times.note(1, 1, 1.0)
    assert sum(times.line(1)) == pytest.approx(1.0)


def test_tokens_beyond_never_seem_free_for_having_been_forgotten() -> None:
    times = StepTimes()
    for num_tokens in (16, 32, 64):
        times.warm_up(num_tokens, num_tokens / 100)
    for _ in range(2000):
        times.note(32, 0.32)
    table = times.table(64)
    assert table[40] - table[32] == pytest.approx(0.08, rel=0.1)
