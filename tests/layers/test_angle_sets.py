"""Which rows of a rotary table a request is computed with, and what stands there."""

import numpy as np
import pytest
import torch

from serve_app.layers import rotary as rotary_module
from serve_app.layers.angle_sets import SetsByLength
from serve_app.layers.rope_scaling import RopeScaling, dynamic_base, inverse_frequencies
from serve_app.layers.rotary import PlacedRotary, Rotary

SHORT, LONG = torch.tensor([1.0, 0.5]), torch.tensor([0.25, 0.125])


def angles(table: np.ndarray, first_row: int, count: int) -> np.ndarray:
    rows = table[first_row : first_row + count]
    return np.arctan2(rows[:, 2:], rows[:, :2])


def expected(frequencies: torch.Tensor, count: int) -> np.ndarray:
    turns = np.arange(count)[:, None] * frequencies.numpy()
    return np.arctan2(np.sin(turns), np.cos(turns))


def test_the_short_set_stands_before_the_long_one() -> None:
    rotary = Rotary(LONG, 100, 2.0, short=Rotary(SHORT, 10))
    assert rotary.sets.are_several
    table = rotary.covering(40)
    assert len(table) >= 50
    short, long = rotary.sets.take(3, 10, 50), rotary.sets.take(3, 11, 50)
    assert short is not None
    assert long is not None
    assert short.key != long.key
    np.testing.assert_allclose(angles(table, short.first_row, 10), expected(SHORT, 10), atol=1e-5)
    np.testing.assert_allclose(angles(table, long.first_row, 40), expected(LONG, 40), atol=1e-5)
    assert np.hypot(table[10:, 0], table[10:, 2]) == pytest.approx(2.0)
    assert not rotary.sets.is_outgrown(short, 10)
    assert rotary.sets.is_outgrown(short, 11)
    assert not rotary.sets.is_outgrown(long, 11)
    longer = rotary.covering(100)
    assert len(longer) == 110
    np.testing.assert_array_equal(longer[: len(table)], table)


def test_one_set_for_all_where_nothing_longer_is_served() -> None:
    rotary = Rotary(SHORT, 10)
    assert not rotary.sets.are_several
    assert rotary.rows_ahead == 0


def test_places_are_filled_shared_and_given_back() -> None:
    filled: list[tuple[int, int, int]] = []
    sets = SetsByLength(10, 2, 100, lambda row, length, count: filled.append((row, length, count)))
    plain = sets.take(4, 10, 50)
    assert plain is not None
    assert (plain.first_row, filled) == (0, [])
    one = sets.take(30, 30, 40)
    # A shorter prompt whose answer went beyond the original length: the set of the longest that it may become.
    other = sets.take(4, 11, 50)
    same = sets.take(30, 33, 60)
    assert one is not None
    assert other is not None
    assert one == same
    assert filled == [(one.first_row, 30, 40), (other.first_row, 50, 50), (one.first_row, 30, 60)]
    assert {one.first_row, other.first_row} == {10, 110}
    assert sets.take(20, 20, 30) is None
    sets.share(one)
    for _ in range(2):
        sets.give_back(one)
        assert sets.take(20, 20, 30) is None
    sets.give_back(one)
    third = sets.take(20, 20, 30)
    assert third is not None
    assert third.first_row == one.first_row
    assert third.key != one.key
    sets.give_back(plain)
    assert sets.is_outgrown(plain, 11)
    assert not sets.is_outgrown(other, 12)


def test_the_table_of_places() -> None:
    scaling = RopeScaling("dynamic", 4.0, original_max_position_embeddings=10)

    def frequencies(length: int) -> torch.Tensor:
        return inverse_frequencies(4, dynamic_base(1e4, 4, scaling, length), RopeScaling())

    rotary = PlacedRotary(frequencies, 10, 40, torch.device("cpu"))
    table = rotary.covering(5)
    np.testing.assert_allclose(angles(table, 0, 10), expected(frequencies(10), 10), atol=1e-5)
    taken = rotary.sets.take(25, 25, 30)
    assert taken is not None
    assert rotary.covering(30) is table
    np.testing.assert_allclose(angles(table, taken.first_row, 30), expected(frequencies(25), 30), atol=1e-5)
    assert rotary.on_device(30).data_ptr() == table.ctypes.data


def test_a_devices_table_gets_the_rows_of_a_new_length_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Tensor] = []

    def without_waiting(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied.append(rows.clone())
        return rows.to(device)

    monkeypatch.setattr(rotary_module, "without_waiting", without_waiting)
    rotary = PlacedRotary(lambda length: torch.tensor([1.0, 1.0 / length]), 10, 40, torch.device("meta"))
    assert rotary.on_device(30).shape == (10 + 16 * 40, 4)
    assert not copied
    taken = rotary.sets.take(25, 25, 30)
    assert taken is not None
    [rows] = copied
    assert np.array_equal(rows, rotary.covering(30)[taken.first_row : taken.first_row + 30])
    assert rows.abs().max() > 0
