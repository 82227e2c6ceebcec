"""Matrices for the tests of planar kernels: blocks of every type, HQQ too, and what the reference makes of them."""

import torch
from block_data import any_blocks, usual_blocks
from torch import Tensor

from kernels.formats import BY_NAME
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PLANAR
from kernels.reference.hqq import HqqTensor
from kernels.reference.quant import dequantize

TYPES = list(PLANAR)


def hqq(bits: int, rows: int, columns: int, seed: int = 0) -> HqqTensor:
    """Random codes, with scales and zeros of a usual size."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, columns // 64, generator=generator) + 0.5) * 0.01
    zero = torch.rand(rows, columns // 64, generator=generator) * ((1 << bits) - 1)
    return HqqTensor.of(bits, codes, scale, zero)


def columns_of(name: str, at_least: int) -> int:
    """The next number of columns that a type can have."""
    block = PLANAR[name].block
    return -(-at_least // block) * block


def matrix_and_weights(
    name: str, rows: int, columns: int, device: torch.device, seed: int = 0
) -> tuple[PlanarMatrix, Tensor]:
    """A matrix of usual numbers on the device, and its float32 weights on the CPU."""
    if name.startswith("HQQ"):
        tensor = hqq(PLANAR[name].low_bits, rows, columns, seed)
        weights, matrix = tensor.dequantize(), PlanarMatrix(PLANAR[name], rows, columns, device)
        matrix.pack_hqq(0, tensor)
        return matrix, weights
    blocks = usual_blocks(name, rows, columns, seed)
    return PlanarMatrix.of(name, blocks.to(device)), dequantize(name, blocks)


def wild_matrix(name: str, rows: int, columns: int, device: torch.device) -> tuple[PlanarMatrix, Tensor]:
    """The same of any bits: subnormal, infinite and NaN scales, negative ones, every code."""
    if name.startswith("HQQ"):
        usual = hqq(PLANAR[name].low_bits, rows, columns)
        numbers = torch.randint(-32768, 32767, (2, *usual.scale.shape), dtype=torch.int16).view(torch.float16)
        tensor = HqqTensor(usual.bits, usual.codes, numbers[0].contiguous(), numbers[1].contiguous())
        matrix = PlanarMatrix(PLANAR[name], rows, columns, device)
        matrix.pack_hqq(0, tensor)
        return matrix, tensor.dequantize()
    form = BY_NAME[name]
    blocks = any_blocks(form, rows, columns, seed=5)
    view = blocks.view(-1, form.block_bytes)
    for special, bits in enumerate((0x7C00, 0xFC00, 0x7E01, 0x8000, 0x0001, 0xFBFF)):
        at = form.offset("d")
        view[special, at : at + 2] = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
    return PlanarMatrix.of(name, blocks.to(device)), dequantize(name, blocks)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit; a NaN equals any NaN, since processors choose its payload."""
    actual = actual.cpu()
    integers = {4: torch.int32, 2: torch.int16}[actual.element_size()]
    is_equal = (actual.view(integers) == expected.view(integers)) | (actual.isnan() & expected.isnan())
    return actual.dtype == expected.dtype and actual.shape == expected.shape and bool(is_equal.all())
