"""The searches of kernels.reference.encode_search on a device, bit for bit.

A lane is a sub-block, whose weights it goes through one after the other: x and w are [n, sub-blocks], so that lanes lie
side by side in memory, and a sum adds up in the order of the weights, as the reference's does.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import encode_affine, encode_scales, encode_symmetric
from kernels.gpu.encode_math import minus_zero
from kernels.gpu.launch import IS_INTERPRETED, require_device
from kernels.reference.encode_search import Affine, Searches

LANES = 4096 if IS_INTERPRETED else 128
"""Sub-blocks of a program, one a thread: codes that are refined in memory are read and written by one thread each. The
interpreter costs by operations, not by elements."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of every launch of an encoder: a product and the sum after it are rounded one by one."""


@triton.jit
def _running_sum(terms, out, count, num_lanes, term_stride, lane_stride, LANES: tl.constexpr):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    keep = lane < num_lanes
    at = terms + lane.to(tl.int64) * lane_stride
    total = minus_zero(LANES)
    for _ in range(count):
        total += tl.load(at, mask=keep, other=0.0)
        at += term_stride
    tl.store(out + lane, total, mask=keep)


def running_sum(terms: Tensor) -> Tensor:
    """The sum over the first of two dimensions, from its first to its last; any strides."""
    count, num_lanes = terms.shape
    out = torch.empty(num_lanes, dtype=torch.float32, device=terms.device)
    _launch(_running_sum, num_lanes, terms, out, count, num_lanes, *terms.stride())
    return out


def search_affine(
    x: Tensor, w: Tensor, top: int, first: float, step: float, count: int, *, is_absolute: bool = False
) -> Affine:
    """See the reference; x and w are contiguous."""
    n, num_lanes = x.shape
    out = torch.empty(4, num_lanes, dtype=torch.float32, device=x.device)
    constants = {"N": n, "TOP": top, "IS_ABSOLUTE": is_absolute}
    _launch(encode_affine.search_affine, num_lanes, x, w, out, num_lanes, first, step, count, **constants)
    return Affine(*out)


def search_symmetric(x: Tensor, w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """See the reference; x and w are contiguous."""
    return _scales_and_codes(encode_symmetric.search_symmetric, x, w, top, 0.1)


def refine_symmetric(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """See the reference; x is contiguous."""
    return _scales_and_codes(encode_symmetric.refine_symmetric, x, None, top)


def quantise_scales(x: Tensor, w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """See the reference; x and w are contiguous."""
    return _scales_and_codes(encode_scales.quantise_scales, x, w, top, 0.1)


IN_TRITON = Searches(running_sum, search_affine, search_symmetric, refine_symmetric, quantise_scales)


def _scales_and_codes(kernel: Any, x: Tensor, w: Tensor | None, top: int, *numbers: float) -> tuple[Tensor, Tensor]:
    n, num_lanes = x.shape
    out = torch.empty(num_lanes, dtype=torch.float32, device=x.device)
    codes = torch.empty_like(x)
    operands = (x,) if w is None else (x, w)
    _launch(kernel, num_lanes, *operands, out, codes, num_lanes, *numbers, N=n, TOP=top)
    return out, codes


def _launch(kernel: Any, num_lanes: int, *arguments: Any, **constants: Any) -> None:
    require_device(arguments[0])
    kernel[(triton.cdiv(num_lanes, LANES),)](*arguments, **constants, LANES=LANES, **OPTIONS)
