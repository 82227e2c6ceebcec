"""Encoders of the types with one scale a block, without importance: one pass, bytes equal to the reference's.

A program has a tile of blocks, a row of it for each. x is contiguous float32; out uint8 [blocks, bytes per block].
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import BY_NAME
from kernels.gpu.encode_search import OPTIONS
from kernels.gpu.launch import IS_INTERPRETED, require_device
from kernels.gpu.rounding import e4m3_bits
from kernels.reference.quant_simple import FP4_VALUES

_BLOCKS = 256 if IS_INTERPRETED else 16
"""Of a program."""


@triton.jit
def _tile(x, num_blocks, BLOCKS: tl.constexpr, N: tl.constexpr):
    """The blocks' numbers, which of them there are, and the values [blocks, n]."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    keep = block < num_blocks
    i = tl.arange(0, N)
    values = tl.load(x + block[:, None] * N + i[None, :], mask=keep[:, None], other=0.0)
    return block, keep, i, values


@triton.jit
def _inverse(d):
    """1 / d, 0 for 0, and whether that overflows: there all codes are zero."""
    is_usual = d != 0
    inverse = tl.where(is_usual, tl.div_rn(tl.where(is_usual, 1.0, 0.0), tl.where(is_usual, d, 1.0)), 0.0)
    is_lost = tl.abs(inverse) == float("inf")
    return tl.where(is_lost, 0.0, inverse), is_lost


@triton.jit
def _first(values, is_one, i):
    """The first of the values of each row for which is_one holds, its zero's sign kept: a sum of the bits of one."""
    at = tl.min(tl.where(is_one, i[None, :], 1 << 30), axis=1)
    bits = tl.where(i[None, :] == at[:, None], values.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _store_half(at, value, keep):
    bits = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(at, (bits & 255).to(tl.uint8), mask=keep)
    tl.store(at + 1, (bits >> 8 & 255).to(tl.uint8), mask=keep)


@triton.jit
def _store_codes(at, codes, keep, HAS_FIFTH: tl.constexpr, BLOCKS: tl.constexpr):
    """codes int32 [blocks, 32]: four bytes of fifth bits if there are any, then a byte for codes 16 apart."""
    if HAS_FIFTH:
        weights = (codes >> 4) << (tl.arange(0, 32) % 8)[None, :]
        bits = tl.sum(tl.reshape(weights, (BLOCKS, 4, 8)), axis=2)
        tl.store(at[:, None] + tl.arange(0, 4)[None, :], bits.to(tl.uint8), mask=keep[:, None])
        at += 4
    low, high = tl.split(tl.trans(tl.reshape(codes & 15, (BLOCKS, 2, 16)), (0, 2, 1)))
    tl.store(at[:, None] + tl.arange(0, 16)[None, :], (low | high << 4).to(tl.uint8), mask=keep[:, None])


@triton.jit
def _eight_bits(x, out, num_blocks, BLOCKS: tl.constexpr):
    block, keep, i, values = _tile(x, num_blocks, BLOCKS, 32)
    d = tl.max(tl.abs(values), axis=1)
    d = tl.div_rn(d, d * 0.0 + 127.0)
    inverse, _ = _inverse(d)
    v = values * inverse[:, None]
    codes = v.to(tl.int32)
    rest = v - codes.to(tl.float32)
    codes += (rest >= 0.5).to(tl.int32) - (rest <= -0.5).to(tl.int32)
    at = out + block * 34
    _store_half(at, d, keep)
    tl.store(at[:, None] + 2 + i[None, :], (codes & 255).to(tl.uint8), mask=keep[:, None])


@triton.jit
def _symmetric(x, out, num_blocks, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    TOP: tl.constexpr = 1 << (BITS - 1)
    block, keep, i, values = _tile(x, num_blocks, BLOCKS, 32)
    size = tl.abs(values)
    extreme = _first(values, size == tl.max(size, axis=1)[:, None], i)
    d = tl.where(extreme == 0, 0.0, extreme) * (-1.0 / TOP)
    inverse, is_lost = _inverse(d)
    v = values * inverse[:, None] + (TOP + 0.5)
    codes = tl.minimum(tl.maximum(v, 0.0), 2.0 * TOP - 1.0).to(tl.int32)
    codes = tl.where(is_lost[:, None], 0, codes)
    at = out + block * (18 if BITS == 4 else 22)
    _store_half(at, d, keep)
    _store_codes(at + 2, codes, keep, BITS == 5, BLOCKS)


@triton.jit
def _affine(x, out, num_blocks, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    TOP: tl.constexpr = (1 << BITS) - 1
    block, keep, i, values = _tile(x, num_blocks, BLOCKS, 32)
    least = _first(values, values == tl.min(values, axis=1)[:, None], i)
    most = _first(values, values == tl.max(values, axis=1)[:, None], i)
    d = tl.div_rn(most - least, most * 0.0 + TOP)
    inverse, is_lost = _inverse(d)
    v = (values - least[:, None]) * inverse[:, None] + 0.5
    codes = tl.minimum(tl.maximum(v, 0.0), TOP).to(tl.int32)
    codes = tl.where(is_lost[:, None], 0, codes)
    at = out + block * (20 if BITS == 4 else 24)
    _store_half(at, d, keep)
    _store_half(at + 2, least, keep)
    _store_codes(at + 4, codes, keep, BITS == 5, BLOCKS)


@triton.constexpr_function
def _fp4_value(code: int) -> float:
    return float(FP4_VALUES[code])


@triton.jit
def _mxfp4(x, out, num_blocks, first_up, BLOCKS: tl.constexpr):
    """first_up int32 [256]: see _rounded_up."""
    block, keep, _, values = _tile(x, num_blocks, BLOCKS, 32)
    most = tl.max(tl.abs(values), axis=1).to(tl.int32, bitcast=True)
    power = most >> 23
    is_up = (most & 0x007FFFFF) >= tl.load(first_up + power)
    exponent = tl.maximum(power - 2 + is_up.to(tl.int32), 0)
    bits = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), tl.maximum(exponent - 1, 0) << 23)
    scale = bits.to(tl.float32, bitcast=True)[:, None]
    best = tl.abs(scale * 0.0 - values)
    codes = values.to(tl.int32, bitcast=True) & 0
    for code in tl.static_range(1, 16):
        lost = tl.abs(scale * _fp4_value(code) - values)
        codes = tl.where(lost < best, code, codes)
        best = tl.minimum(lost, best)
    at = out + block * 17
    tl.store(at, exponent.to(tl.uint8), mask=keep)
    _store_codes(at + 1, codes, keep, False, BLOCKS)


@triton.jit
def _fp8(x, out, num_blocks, BLOCKS: tl.constexpr):
    block, keep, i, values = _tile(x, num_blocks, BLOCKS, 128)
    d = tl.max(tl.abs(values), axis=1)
    d = tl.div_rn(d, d * 0.0 + 448.0)
    divisor = tl.where(d == 0, 1.0, d)[:, None] + values * 0.0
    codes = e4m3_bits(tl.div_rn(values, divisor))
    at = out + block * 132
    bits = d.to(tl.int32, bitcast=True)
    for byte in tl.static_range(4):
        tl.store(at + byte, (bits >> 8 * byte & 255).to(tl.uint8), mask=keep)
    tl.store(at[:, None] + 4 + i[None, :], codes, mask=keep[:, None])


def _encode(name: str, kernel: Any, constants: dict[str, int], x: Tensor, *tables: Tensor) -> Tensor:
    form = BY_NAME[name]
    require_device(x)
    rows, columns = x.shape
    out = torch.empty(rows, form.row_bytes(columns), dtype=torch.uint8, device=x.device)
    num_blocks = rows * columns // form.block_length
    blocks = min(_BLOCKS, triton.next_power_of_2(num_blocks))
    kernel[(triton.cdiv(num_blocks, blocks),)](
        x.contiguous(), out, num_blocks, *tables, **constants, BLOCKS=blocks, **OPTIONS
    )
    return out


@cache
def _rounded_up(device: torch.device) -> Tensor:
    """int32 [256]: from which fraction of a float32 on, by its exponent's bits, its logarithm to base 2 is rounded to
    the next whole number; 2^23 for none. Asked of the host's own logarithm, a GPU's rounds otherwise."""
    powers = torch.arange(1, 255, dtype=torch.int32)
    fractions = torch.arange((1 << 23) - 256, 1 << 23, dtype=torch.int32)
    values = (powers.unsqueeze(1) << 23 | fractions).view(torch.float32)
    is_up = values.log2().floor() > (powers - 127).unsqueeze(1)
    table = torch.full((256,), 1 << 23, dtype=torch.int32)
    table[1:255] -= is_up.sum(1).int()
    return table.to(device)


def _encode_mxfp4(x: Tensor) -> Tensor:
    return _encode("MXFP4", _mxfp4, {}, x, _rounded_up(x.device))


ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": partial(_encode, "Q8_0", _eight_bits, {}),
    "Q4_0": partial(_encode, "Q4_0", _symmetric, {"BITS": 4}),
    "Q5_0": partial(_encode, "Q5_0", _symmetric, {"BITS": 5}),
    "Q4_1": partial(_encode, "Q4_1", _affine, {"BITS": 4}),
    "Q5_1": partial(_encode, "Q5_1", _affine, {"BITS": 5}),
    "MXFP4": _encode_mxfp4,
    "FP8": partial(_encode, "FP8", _fp8, {}),
}
"""x float32 [rows, columns], none of them 0 → uint8 [rows, bytes per row]."""
