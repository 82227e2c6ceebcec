"""Narrowing float32 to the type of a tensor, and to e4m3, to nearest with ties to even."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import IS_INTERPRETED

INTERPRETED = tl.constexpr(IS_INTERPRETED)
"""The interpreter cuts bits off where bfloat16 and e4m3 must be rounded, and cannot multiply matrices of bfloat16."""


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in another float type."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits >> 16) & 1
        bits = tl.where(x == x, (bits + 0x7FFF + even) & -65536, bits)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def e4m3_bits(x):
    """float32 x as the byte of float8_e4m3fn, what is larger than 448 as 448, NaN as NaN.

    By integers: a type that half of the devices lack is not needed, and the bytes are torch's own.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # 0x43E00000 is 448.
    clamped = tl.minimum(magnitude, 0x43E00000)
    normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - 960
    # Below 2**-6 the step is 2**-9: adding 2**14 leaves the multiple of it in the lowest bits.
    small = (clamped.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(clamped < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (sign | code).to(tl.uint8)


def byte_view(cache: Tensor) -> Tensor:
    """A cache as kernels write it: e4m3 as bytes, everything else as it is."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
