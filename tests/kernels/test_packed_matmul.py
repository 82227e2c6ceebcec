"""Products with packed matrices in every instruction set of this CPU, against plain float64 arithmetic.

The bound for activations rounded to 8 bits: with x = q * scale + e, |e| <= scale / 2, a product errs by at most
sum |w| * scale / 2, and by the rounding of its float32 sums. The sharper check leaves out the first part: against the
product with q * scale itself only rounding is left, as the integer dots are exact.
"""

from collections.abc import Iterator

import pytest
import torch
from block_data import Q8_32, Q8_256, QUANTISED, TYPES, randn, rounded_to_8_bits, usual_blocks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu import _native
from kernels.cpu.packed import PackedMatrix
from kernels.formats import BY_NAME
from kernels.reference.quant import dequantize

ISAS = _native.instruction_sets()


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The plain side's operations are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS, autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(before)


def made(name: str, rows: int, columns: int, seed: int = 0) -> tuple[PackedMatrix, Tensor]:
    """A matrix and its weights, float64 [rows, columns]."""
    form = BY_NAME[name]
    blocks = usual_blocks(name, rows, columns, seed)
    return PackedMatrix.of(form.type_id, blocks, columns), dequantize(form, blocks).double()


def columns_of(name: str, blocks: int) -> int:
    form = BY_NAME[name]
    return blocks * form.block_length if form.is_block else 37 * blocks


def check(name: str, matrix: PackedMatrix, weights: Tensor, x: Tensor, *, exact: bool) -> None:
    got = matrix.matmul(x, exact=exact).double()
    # What the sums of a row could reach: a type's minimum and scale part may cancel, hence 4.
    reach = x.double().abs() @ weights.abs().T + 4 * x.double().abs().mean(1, keepdim=True) * weights.abs().sum(1)
    rounding = 1e-6 * reach + 1e-30
    if exact or name not in (*QUANTISED, "BF16"):
        assert ((got - x.double() @ weights.T).abs() <= 1e-5 * reach / 4 + 1e-30).all()
    elif name == "BF16":
        assert ((got - x.bfloat16().double() @ weights.T).abs() <= rounding).all()
        assert ((got - x.double() @ weights.T).abs() <= 2.0**-8 * reach).all()
    else:
        read, scale = rounded_to_8_bits(x, 32 if name in Q8_32 else 256)
        assert ((got - read @ weights.T).abs() <= rounding).all()
        bound = 0.50002 * scale @ weights.abs().T + rounding
        assert ((got - x.double() @ weights.T).abs() <= bound).all()


@pytest.mark.parametrize("name", TYPES)
def test_within_the_bound(name: str) -> None:
    columns = columns_of(name, 5)
    matrix, weights = made(name, 37, columns)
    for tokens in (1, 3, 21):
        x = randn(tokens, columns, seed=tokens)
        check(name, matrix, weights, x, exact=False)
        check(name, matrix, weights, x, exact=True)


cases = st.tuples(
    st.sampled_from(TYPES), st.integers(1, 50), st.integers(1, 5), st.integers(0, 20), st.booleans(), st.integers(0, 99)
)


@settings(max_examples=25)
@given(cases)
@example(("Q8_0", 1, 1, 1, False, 0))
def test_any_shape(case: tuple[str, int, int, int, bool, int]) -> None:
    name, rows, blocks, tokens, exact, seed = case
    columns = columns_of(name, blocks)
    matrix, weights = made(name, rows, columns, seed)
    x = randn(tokens, columns, seed=seed + 1) * 10.0 ** (seed % 7 - 3)
    check(name, matrix, weights, x, exact=exact)


@pytest.mark.parametrize("name", QUANTISED)
def test_the_largest_weights_and_activations_overflow_nothing(name: str) -> None:
    form = BY_NAME[name]
    columns = 256
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        blocks = usual_blocks(name, 18, columns)
        view = blocks.view(18, -1, form.block_bytes)
        for field, size in form.fields:
            if field not in ("d", "dmin", "m"):
                view[..., form.offset(field) : form.offset(field) + size] = byte
        matrix, weights = PackedMatrix.of(form.type_id, blocks, columns), dequantize(form, blocks).double()
        ones = torch.ones(3, columns)
        for x in (ones, -ones, ones * (-1.0) ** torch.arange(columns)):
            check(name, matrix, weights, x, exact=False)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_a_tokens_bits_do_not_depend_on_its_batch(name: str, exact: bool) -> None:
    columns = columns_of(name, 3)
    matrix, _ = made(name, 83, columns)  # several tiles, and a part of one
    x = randn(23, columns)
    whole = matrix.matmul(x, exact=exact)
    for size in (1, 2, 3, 4, 7, 8, 9, 17):
        for first in (0, 23 - size):
            part = matrix.matmul(x[first : first + size], exact=exact)
            assert torch.equal(part, whole[first : first + size])


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "BF16", "IQ4_XS"])
def test_threads_do_not_change_bits(name: str) -> None:
    columns = columns_of(name, 8)
    matrix, _ = made(name, 1030, columns)
    x = randn(17, columns)
    expected = matrix.matmul(x)
    try:
        for threads in (2, 3):
            _native.set_num_threads(threads)
            for tokens in (1, 17):
                assert torch.equal(matrix.matmul(x[:tokens]), expected[:tokens])
    finally:
        _native.set_num_threads(1)


@pytest.mark.parametrize("name", QUANTISED)
def test_fused_instruction_sets_agree_bit_for_bit(name: str) -> None:
    columns = columns_of(name, 6)
    matrix, _ = made(name, 50, columns)
    x = randn(19, columns)
    results = []
    for isa in ISAS:
        if isa != "generic":  # has no fused multiply-add
            _native.use_instruction_set(isa)
            results.append(matrix.matmul(x))
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("name", ["Q5_0", "Q3_K", "F16", "BF16", "IQ2_S"])
def test_bias_and_a_slice_as_result(name: str) -> None:
    columns = columns_of(name, 3)
    matrix, _ = made(name, 37, columns)
    x, bias = randn(11, columns), randn(37, seed=3)
    expected = matrix.matmul(x) + bias
    wide = torch.full((11, 60), 7.0)
    for tokens in (1, 11):
        got = matrix.matmul(x[:tokens], bias=bias, out=wide[:tokens, 9:46])
        assert torch.equal(got, expected[:tokens])
    assert (wide[:, :9] == 7).all()
    assert (wide[:, 46:] == 7).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F32", "BF16", "TQ1_0"])
def test_misaligned_activations_and_results(name: str) -> None:
    columns = columns_of(name, 3)
    matrix, _ = made(name, 21, columns)
    x = randn(6, columns)
    storage = torch.empty(6 * columns + 1)
    shifted = storage[1:].view(6, columns)
    shifted.copy_(x)
    out = torch.empty(6 * 21 + 1)[1:].view(6, 21)
    assert torch.equal(matrix.matmul(shifted, out=out), matrix.matmul(x))


def test_no_tokens() -> None:
    for name in TYPES:
        matrix, _ = made(name, 5, columns_of(name, 1))
        assert matrix.matmul(torch.empty(0, matrix.shape[1])).shape == (0, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q2_K", "Q4_K", "BF16", "F32", "IQ3_S"])
def test_what_is_not_finite_stays_in_its_row(name: str, bad: float) -> None:
    columns = columns_of(name, 6)
    matrix, _ = made(name, 33, columns)
    x = randn(9, columns)
    expected = matrix.matmul(x)
    x[4, columns // 2] = bad
    got = matrix.matmul(x)
    assert not got[4].isfinite().any()
    others = [t for t in range(9) if t != 4]
    assert torch.equal(got[others], expected[others])


@pytest.mark.parametrize("name", [*Q8_32, *Q8_256])
def test_zeros_and_tiny_values(name: str) -> None:
    columns = columns_of(name, 4)
    matrix, _ = made(name, 17, columns)
    assert not matrix.matmul(torch.zeros(3, columns)).any()
    assert matrix.matmul(torch.full((3, columns), 1e-40)).abs().max() < 1e-30


def test_refusals() -> None:
    matrix, _ = made("Q4_0", 4, 64)
    for x in (torch.zeros(1, 32), torch.zeros(1, 64, dtype=torch.float64), torch.zeros(64, 1).T.expand(2, 64)):
        with pytest.raises(AssertionError):
            matrix.matmul(x)
    with pytest.raises(IndexError, match="overlap"):
        matrix.matmul(torch.zeros(2, 64), out=torch.zeros(5).as_strided((2, 4), (1, 1)))


@pytest.mark.nightly
@settings(max_examples=3000)
@given(cases)
def test_many_shapes(case: tuple[str, int, int, int, bool, int]) -> None:
    name, rows, blocks, tokens, exact, seed = case
    columns = columns_of(name, 3 * blocks)
    matrix, weights = made(name, 3 * rows, columns, seed)
    check(name, matrix, weights, randn(5 * tokens, columns, seed=seed + 1), exact=exact)
