"""Products of groups of rows with a matrix each: the bits of single products, whatever the groups."""

from collections.abc import Iterator

import pytest
import torch
from block_data import randn, usual_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu import _native
from kernels.cpu.packed import PackedMatrix, grouped_matmul
from kernels.formats import BY_NAME

COLUMNS = 512
TYPES = ["F32", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"]


@pytest.fixture(autouse=True, params=_native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    before, threads = _native.instruction_set(), _native.num_threads()
    _native.use_instruction_set(request.param)
    _native.set_num_threads(3)
    yield
    _native.use_instruction_set(before)
    _native.set_num_threads(threads)


def experts(name: str, count: int, rows: int) -> list[PackedMatrix]:
    type_id = BY_NAME[name].type_id
    return [PackedMatrix.of(type_id, usual_blocks(name, rows, COLUMNS, seed=e), COLUMNS) for e in range(count)]


def starts_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()])


def expected(matrices: list[PackedMatrix], x: Tensor, counts: list[int], who: Tensor, exact: bool) -> Tensor:
    parts = [m.matmul(x[ids], exact=exact) for m, ids in zip(matrices, who.split(counts), strict=True)]
    return torch.cat(parts)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_the_bits_of_single_products(name: str, exact: bool) -> None:
    matrices, x = experts(name, 6, 40), randn(13, COLUMNS)
    counts = [1, 0, 13, 3, 0, 9]
    who = torch.cat([torch.randperm(13, generator=torch.Generator().manual_seed(n))[:n] for n in counts])
    got = grouped_matmul(matrices, x, starts_of(counts), who, exact=exact)
    assert torch.equal(got, expected(matrices, x, counts, who, exact))


def test_rows_in_the_order_of_their_groups() -> None:
    matrices, counts = experts("Q4_K", 3, 33), [2, 5, 0]
    x = randn(7, COLUMNS)
    got = grouped_matmul(matrices, x, starts_of(counts))
    assert torch.equal(got, expected(matrices, x, counts, torch.arange(7), exact=False))


@settings(max_examples=25)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=9), rows=st.integers(1, 70), threads=st.integers(1, 4))
def test_any_groups(counts: list[int], rows: int, threads: int) -> None:
    _native.set_num_threads(threads)
    matrices, x = experts("Q8_0", len(counts), rows), randn(5, COLUMNS)
    who = torch.arange(sum(counts)) % 5
    got = grouped_matmul(matrices, x, starts_of(counts), who)
    assert torch.equal(got, expected(matrices, x, counts, who, exact=False))


def test_no_rows_at_all() -> None:
    assert grouped_matmul(experts("Q8_0", 2, 20), randn(0, COLUMNS), starts_of([0, 0])).shape == (0, 20)


def test_refusals() -> None:
    matrices, x = experts("Q8_0", 2, 20), randn(4, COLUMNS)
    with pytest.raises(IndexError, match="row outside x"):
        grouped_matmul(matrices, x, starts_of([1, 1]), torch.tensor([0, 4]))
    with pytest.raises(IndexError, match="row outside x"):
        grouped_matmul(matrices, x, starts_of([1, 1]), torch.tensor([-1, 0]))
    with pytest.raises(IndexError, match="overlap"):
        grouped_matmul(matrices, x, torch.tensor([0, 3, 2]), torch.tensor([0, 1]))
    with pytest.raises(IndexError, match="all rows"):
        grouped_matmul(matrices, x, starts_of([1, 1]))
    with pytest.raises(IndexError, match="all rows"):
        grouped_matmul(matrices, x, torch.tensor([1, 2, 4]))
    with pytest.raises(IndexError, match="different sizes"):
        grouped_matmul([matrices[0], *experts("Q8_0", 1, 36)], x, starts_of([2, 2]))
    with pytest.raises(IndexError, match="different sizes or activations"):
        grouped_matmul([matrices[0], *experts("Q4_K", 1, 20)], x, starts_of([2, 2]))
    with pytest.raises(IndexError, match="no matrix"):
        grouped_matmul([], x, torch.tensor([0]))
