"""Matrices for the tests of planar kernels: blocks of every type, and what the reference makes of them."""

import torch
from block_data import any_blocks, usual_blocks
from torch import Tensor

from kernels.formats import BY_NAME
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PLANAR
from kernels.reference.quant import dequantize

TYPES = list(PLANAR)


def columns_of(name: str, at_least: int) -> int:
    """The next number of columns that a type can have."""
    block = PLANAR[name].block
    return -(-at_least // block) * block


def matrix_and_weights(
    name: str, rows: int, columns: int, device: torch.device, seed: int = 0
) -> tuple[PlanarMatrix, Tensor]:
    """A matrix of usual numbers on the device, and its float32 weights on the CPU."""
    blocks = usual_blocks(name, rows, columns, seed)
    return PlanarMatrix.of(name, blocks.to(device)), dequantize(name, blocks)


def wild_matrix(name: str, rows: int, columns: int, device: torch.device) -> tuple[PlanarMatrix, Tensor]:
    """The same of any bits: subnormal, infinite and NaN scales, negative ones, every code."""
    form = BY_NAME[name]
    blocks = any_blocks(form, rows, columns, seed=5)
    view = blocks.view(-1, form.block_bytes)
    field, size = next((field, size) for field, size in form.fields if field in ("d", "step"))
    at = form.offset(field)
    bits = {2: (0x7C00, 0xFC00, 0x7E01, 0x8000, 0x0001, 0xFBFF), 4: (0x7F8 << 20, 0xFF8 << 20, 0x7FC << 20, 1 << 31, 1)}
    for special, number in enumerate(bits[size]):
        view[special, at : at + size] = torch.tensor(list(number.to_bytes(size, "little")), dtype=torch.uint8)
    return PlanarMatrix.of(name, blocks.to(device)), dequantize(name, blocks)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit; a NaN equals any NaN, since processors choose its payload."""
    actual = actual.cpu()
    integers = {4: torch.int32, 2: torch.int16}[actual.element_size()]
    is_equal = (actual.view(integers) == expected.view(integers)) | (actual.isnan() & expected.isnan())
    return actual.dtype == expected.dtype and actual.shape == expected.shape and bool(is_equal.all())
