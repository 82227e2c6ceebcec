import pytest
import torch

from kernels.reference.sampling import draw, filter_sorted, philox4x32_10, uniform

# Known answers of the Random123 distribution, version 1.14: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[torch.Tensor]:
    return [torch.tensor([int(word, 16)]) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_numbers(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    assert [int(w) for w in philox4x32_10((c0, c1, c2, c3), (k0, k1))] == [int(w, 16) for w in expected.split()]


def test_uniform_is_the_first_word_of_the_seed_and_position() -> None:
    assert uniform(torch.tensor([0]), torch.tensor([0])).item() == 0x6627E8D5 / 2**32
    u = uniform(torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200))
    assert len(u.unique()) > 19990
    assert abs(u.mean() - 0.5) < 0.01
    assert u.min() >= 0
    assert u.max() < 1


def test_draw_never_takes_what_weighs_nothing() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    u = torch.tensor([0.0, 0.499, 0.5, 1 - 2.0**-32], dtype=torch.float64)
    assert draw(weights.expand(4, -1), u).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "expected"),
    [
        (0, 1.0, 0.0, 5),
        (2, 1.0, 0.0, 2),
        (0, 0.5, 0.0, 2),  # 0.4 is not enough, the token that crosses stays
        (0, 0.4, 0.0, 1),
        (0, 0.0, 0.0, 1),
        (3, 0.5, 0.0, 2),  # half of 0.9
        (0, 1.0, 0.5, 3),
        (0, 1.0, 1.0, 1),
        (4, 0.95, 0.3, 3),
    ],
)
def test_filters(top_k: int, top_p: float, min_p: float, expected: int) -> None:
    sorted_row = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]])
    kept = filter_sorted(sorted_row, torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    assert (kept > 0).sum() == expected
    assert torch.equal(kept[0, :expected], sorted_row[0, :expected])
