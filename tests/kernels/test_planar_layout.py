"""The planes of the GPU's matrices: exact inverse, documented places, sizes. Plain torch, no kernel runs."""

import pytest
import torch
from block_data import any_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.formats import BY_NAME
from kernels.gpu import planar
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PLANAR, planar_form

TYPES = list(PLANAR)
BITS_A_WEIGHT = {
    "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5,
    "Q2_K": 2.625, "Q3_K": 3.5625, "Q4_K": 4.625, "Q5_K": 5.625, "Q6_K": 6.5625, "HQQ4": 5, "HQQ8": 9,
}  # fmt: skip


# Where docs/kernels.md has the high bits of fields 0, 1, …
HIGH_BIT = {
    "Q5_0": (0, 4, 1, 5, 2, 6, 3, 7), "Q5_1": (0, 4, 1, 5, 2, 6, 3, 7), "Q5_K": (0, 4, 1, 5, 2, 6, 3, 7),
    "Q6_K": (0, 4, 8, 12, 2, 6, 10, 14), "Q3_K": (0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15),
}  # fmt: skip


@settings(max_examples=80)
@given(st.sampled_from(TYPES), st.integers(0, 9), st.integers(1, 5), st.integers(0, 1000))
def test_unpacking_inverts_packing(name: str, rows: int, num_blocks: int, seed: int) -> None:
    form = BY_NAME[name]
    data = any_blocks(form, rows, num_blocks * form.block_length, seed)
    matrix = PlanarMatrix.of(name, data)
    assert matrix.shape == (rows, num_blocks * form.block_length)
    assert torch.equal(matrix.unpack(), data)
    first = seed % (rows + 1)
    count = (seed // 7) % (rows - first + 1)
    assert torch.equal(matrix.unpack(first, count), data[first : first + count])


@pytest.mark.parametrize("name", TYPES)
def test_every_byte_value_in_every_place(name: str) -> None:
    row = any_blocks(BY_NAME[name], 1, BY_NAME[name].block_length, seed=3)
    data = (torch.arange(256, dtype=torch.uint8).unsqueeze(1) + row).contiguous()
    assert torch.equal(PlanarMatrix.of(name, data).unpack(), data)


def test_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    data = any_blocks(BY_NAME["Q6_K"], 11, 512)
    whole = PlanarMatrix.of("Q6_K", data)
    monkeypatch.setattr(planar, "PACK_BYTES", 2 * data.shape[1])
    pieces = PlanarMatrix(PLANAR["Q6_K"], 11, 512)
    pieces.pack(4, data[4:])
    pieces.pack(0, data[:4])
    for one, other in zip(whole.planes, pieces.planes, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(pieces.unpack(), data)


@pytest.mark.parametrize("name", PLANAR)
def test_documented_places_of_low_and_high_bits(name: str) -> None:
    """docs/kernels.md: weight k of a vector is field k // 4 of word k % 4, in both planes of codes."""
    form = PLANAR[name]
    columns = max(form.block, 2 * form.vector)
    codes = torch.randint(0, 1 << (form.low_bits + form.high_bits), (1, columns), dtype=torch.int32)
    matrix = PlanarMatrix(form, 1, columns)
    low = (codes & ((1 << form.low_bits) - 1)).to(torch.uint8)
    high = (codes >> form.low_bits).to(torch.uint8) if form.high_bits else None
    sub = torch.zeros(1, columns // form.run * form.sub_bytes, dtype=torch.uint8)
    block = torch.zeros(1, columns // form.block * form.block_bytes, dtype=torch.uint8)
    matrix._store(0, low, high, sub, block)
    for k in range(columns):
        vector, place = divmod(k, form.vector)
        word, at = 4 * vector + place % 4, place // 4
        code = int(matrix.low[0, word]) >> (at * form.low_bits) & ((1 << form.low_bits) - 1)
        if matrix.high is not None:
            bits = int(matrix.high[0, word]) >> HIGH_BIT[name][at] & ((1 << form.high_bits) - 1)
            code |= bits << form.low_bits
        assert code == codes[0, k]


@pytest.mark.parametrize("name", PLANAR)
def test_size_and_alignment(name: str) -> None:
    form = PLANAR[name]
    matrix = PlanarMatrix(form, 3, 512)
    assert matrix.nbytes == 3 * form.row_bytes(512)
    assert form.row_bytes(512) * 8 / 512 == BITS_A_WEIGHT[name]
    assert form.row_bytes(512) <= 1.05 * BY_NAME[name].row_bytes(512)
    for columns in (form.block, 3 * form.block):
        assert PlanarMatrix(form, 2, columns).low.stride(0) * 4 % 16 == 0
    assert form.block % form.vector == 0 or form.vector % form.block == 0


def test_which_types_have_planes() -> None:
    assert planar_form("IQ4_XS") is planar_form("F16") is planar_form("MXFP4") is planar_form("FP8") is None
    found = planar_form("Q4_K")
    assert found is not None
    assert (found.vector, found.fields, found.high_bytes, found.sub_bytes, found.block_bytes) == (32, 8, 0, 2, 4)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no whole number of Q4_K blocks"):
        PlanarMatrix(PLANAR["Q4_K"], 1, 128)
    matrix = PlanarMatrix(PLANAR["Q8_0"], 3, 64)
    with pytest.raises(IndexError, match="matrix of 3"):
        matrix.pack(2, any_blocks(BY_NAME["Q8_0"], 2, 64))
    with pytest.raises(IndexError, match="matrix of 3"):
        matrix.unpack(-1, 1)
    with pytest.raises(KeyError):
        PlanarMatrix.of("IQ4_XS", torch.zeros(1, 136, dtype=torch.uint8))
