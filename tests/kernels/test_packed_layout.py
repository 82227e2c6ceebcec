"""Packed matrices give their rows back bit for bit, whatever their type and shape."""

import psutil
import pytest
import torch
from block_data import TYPES, any_blocks, usual_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.packed import PackedMatrix
from kernels.formats import BY_NAME
from kernels.reference.quant import dequantize

shapes = st.tuples(st.sampled_from(TYPES), st.integers(1, 50), st.integers(1, 9), st.integers(0, 1000))


@settings(max_examples=100)
@given(shapes)
def test_unpacking_inverts_packing(shape: tuple[str, int, int, int]) -> None:
    name, rows, blocks, seed = shape
    form = BY_NAME[name]
    columns = blocks * form.block_length
    data = any_blocks(form, rows, columns, seed)
    matrix = PackedMatrix.of(form.type_id, data, columns)
    assert matrix.shape == (rows, columns)
    assert torch.equal(matrix.unpack(), data)
    first = seed % rows
    count = (seed // 7) % (rows - first + 1)
    assert torch.equal(matrix.unpack(first, count), data[first : first + count])


@pytest.mark.parametrize("name", TYPES)
def test_a_matrix_is_as_large_as_in_the_file(name: str) -> None:
    form = BY_NAME[name]
    columns = 4 * form.block_length
    matrix = PackedMatrix(form.type_id, 64, columns)
    assert 0 <= matrix.nbytes - 64 * form.row_bytes(columns) < 4 * 64


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_decoded_bit_for_bit(name: str) -> None:
    form = BY_NAME[name]
    columns = 2 * max(form.block_length, 33 if form.block_length == 1 else 1) - (form.block_length == 1)
    data = usual_blocks(name, 37, columns)
    ids = torch.tensor([36, 0, 16, 15, 15, 31])
    expected = dequantize(form, data)[ids]
    assert expected.isfinite().all()
    assert torch.equal(PackedMatrix.of(form.type_id, data, columns).rows(ids), expected)


def test_rows_in_another_order_and_piece_by_piece() -> None:
    form = BY_NAME["Q5_0"]
    data = any_blocks(form, 50, 64)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    matrix = PackedMatrix(form.type_id, 50, 64)
    matrix.pack(32, data, order[32:])
    matrix.pack(0, data, order[:32])
    assert torch.equal(matrix.unpack(), data[order])


def test_rows_at_an_odd_address() -> None:
    form = BY_NAME["Q6_K"]
    data = any_blocks(form, 19, 512)
    storage = torch.empty(data.numel() + 1, dtype=torch.uint8)
    shifted = storage[1:].view(data.shape)
    shifted.copy_(data)
    assert torch.equal(PackedMatrix.of(form.type_id, shifted, 512).unpack(), data)


def test_matrices_outlive_their_neighbours() -> None:
    """They share mappings: one goes when the last matrix in it has gone, and no sooner."""
    form = BY_NAME["Q8_0"]
    data = [any_blocks(form, 1024, 1024, seed) for seed in range(4)]
    process = psutil.Process()
    before = process.memory_info().rss
    matrices = [PackedMatrix.of(form.type_id, data[i % 4], 1024) for i in range(80)]
    assert process.memory_info().rss - before > 80 * matrices[0].nbytes * 0.9
    del matrices[::3]
    assert not PackedMatrix(form.type_id, 1024, 1024).unpack()[:, :2].any()
    kept = [i for i in range(80) if i % 3]
    for i, matrix in zip(kept, matrices, strict=True):
        assert torch.equal(matrix.unpack(), data[i % 4])
    del matrix, matrices
    assert process.memory_info().rss - before < 20 << 20


def test_refusals() -> None:
    form = BY_NAME["Q4_0"]
    data = any_blocks(form, 40, 64)
    matrix = PackedMatrix(form.type_id, 40, 64)
    for first, count in ((8, 16), (0, 20), (32, 16), (-16, 16)):
        with pytest.raises(IndexError, match="pack"):
            matrix.pack(first, data[:count])
    with pytest.raises(IndexError, match="order"):
        matrix.pack(32, data, torch.tensor([0, 1, 2, 3, 4, 5, 6, 40]))
    with pytest.raises(IndexError, match="unpack"):
        matrix.unpack(30, 11)
    for wrong in (-1, 40):
        with pytest.raises(IndexError, match="rows"):
            matrix.rows(torch.tensor([wrong]))
    with pytest.raises(ValueError, match="type"):
        PackedMatrix(BY_NAME["Q1_0"].type_id, 1, 256)
    with pytest.raises(ValueError, match="size"):
        PackedMatrix(form.type_id, 1, 33)
