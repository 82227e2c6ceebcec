"""Arithmetic of the encoders, each operation rounded by itself as on the host.

Launches turn the fusion of products and sums off; division is the rounded one, which `/` is not on a device.
"""

import triton
import triton.language as tl


@triton.jit
def nearest_int(x):
    """The nearest whole number as int32, halves to the even one; out of range as the reference has it, 0 for NaN."""
    bits = (x + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits & 0x007FFFFF) - 0x00400000, 0)


@triton.jit
def nearest(x, LEAST: tl.constexpr, MOST: tl.constexpr):
    """The nearest whole number as float32, clamped."""
    return tl.minimum(tl.maximum(nearest_int(x).to(tl.float32), LEAST), MOST)


@triton.jit
def minus_zero(LANES: tl.constexpr):
    """What sums begin with: adding a first term of either zero to it leaves that zero."""
    return tl.full((LANES,), -2147483648, tl.int32).to(tl.float32, bitcast=True)
