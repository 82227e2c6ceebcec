"""Decoded planes are the reference's numbers, bit for bit."""

import pytest
import torch
from planar_cases import TYPES, columns_of, matrix_and_weights, same_bits, wild_matrix

from kernels.gpu.dequantize import dequantize, gather_rows


@pytest.mark.parametrize("name", TYPES)
def test_any_bits_with_ragged_ends(name: str, device: torch.device) -> None:
    matrix, weights = wild_matrix(name, 37, columns_of(name, 5 * 96), device)
    assert not weights.isfinite().all()
    assert same_bits(dequantize(matrix), weights)


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "HQQ4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_numbers_are_rounded_once(name: str, dtype: torch.dtype, device: torch.device) -> None:
    matrix, weights = matrix_and_weights(name, 9, 256, device)
    assert same_bits(dequantize(matrix, dtype), weights.to(dtype))


def test_ranges_of_rows(device: torch.device) -> None:
    matrix, weights = matrix_and_weights("Q6_K", 130, 512, device)
    assert same_bits(dequantize(matrix, first=3, count=70), weights[3:73])
    assert dequantize(matrix, first=130).shape == dequantize(matrix, count=0).shape == (0, 512)
    with pytest.raises(IndexError, match="matrix of 130"):
        dequantize(matrix, first=100, count=31)


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "Q5_K"])
def test_gathered_rows(name: str, device: torch.device) -> None:
    matrix, weights = matrix_and_weights(name, 40, 256, device)
    ids = torch.tensor([39, 0, 7, 7, 12])
    assert same_bits(gather_rows(matrix, ids.to(device), torch.float32), weights[ids])
    assert gather_rows(matrix, ids[:0].to(device), torch.float32).shape == (0, 256)


def test_ids_of_padding_give_some_row(device: torch.device) -> None:
    matrix, weights = matrix_and_weights("Q8_0", 5, 64, device)
    ids = torch.tensor([-1, 5, 1 << 40, 4], device=device)
    assert same_bits(gather_rows(matrix, ids, torch.float32), weights[[0, 0, 0, 4]])


@pytest.mark.nightly
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (65, 3), (257, 17), (64, 64)])
def test_any_bits_of_more_shapes(name: str, rows: int, blocks: int, device: torch.device) -> None:
    matrix, weights = wild_matrix(name, max(rows, 6), blocks * columns_of(name, 1), device)
    assert same_bits(dequantize(matrix), weights)
