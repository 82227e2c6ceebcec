"""Typed wrappers of the native CPU kernels: tensors in, addresses out. Importing it fails where there is no module.

Tensors are on the CPU, float32, float16 or bfloat16, contiguous unless said otherwise. Wrong shapes are our own
mistakes and end in an AssertionError; sizes that the batch brings (slots, blocks, positions) are checked in C++.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.cpu import _native, sampling
from kernels.formats import block_format

FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The floating point types that the native module computes with, by its own numbers (csrc/jobs.h)."""


def _require(holds: bool) -> None:
    assert holds, "a tensor handed to a native kernel has the wrong shape, dtype or strides"


def dequantize(type_id: int, blocks: Tensor, out: Tensor | None = None) -> Tensor:
    """blocks uint8 [rows, bytes per row] → float32 [rows, columns], written into out if given."""
    rows, row_bytes = blocks.shape
    columns = block_format(type_id).row_length(row_bytes)
    if out is None:
        out = torch.empty((rows, columns), dtype=torch.float32)
    _require(blocks.is_contiguous() and out.is_contiguous() and out.dtype == torch.float32)
    _require(out.shape == (rows, columns))
    _native.dequantize(type_id, blocks.data_ptr(), out.data_ptr(), rows, row_bytes, columns)
    return out


def matmul(type_id: int, x: Tensor, blocks: Tensor, out: Tensor | None = None) -> Tensor:
    """x [T, in] times packed rows, uint8 [out, bytes per row] → [T, out] in x's dtype; sums are formed in float32.

    out: where to write, unit stride in the last dimension (a slice of a wider result may be given).
    """
    tokens, in_features = x.shape
    rows, row_bytes = blocks.shape
    layout = block_format(type_id)
    if out is None:
        out = torch.empty((tokens, rows), dtype=x.dtype)
    _require(x.is_contiguous() and blocks.is_contiguous() and out.stride(1) == 1 and out.shape == (tokens, rows))
    _native.matmul(
        type_id,
        blocks.data_ptr(),
        rows,
        row_bytes,
        layout.block_bytes,
        layout.block_length,
        x.data_ptr(),
        FLOAT_CODES[x.dtype],
        tokens,
        in_features,
        out.data_ptr(),
        FLOAT_CODES[out.dtype],
        out.stride(0),
    )
    return out


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds and positions [S] int64 (seeds as bit patterns) → float64 [S] in [0, 1), Philox4x32-10."""
    return torch.from_numpy(sampling.uniform(seeds.numpy().view(np.uint64), positions.numpy()))


def draw_tokens(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    """See kernels.reference.sampling.draw_tokens. Each row's cost does not depend on the other rows."""
    arrays = [tensor.numpy() for tensor in (logits, temperature, top_k, top_p, min_p, u)]
    return torch.from_numpy(sampling.draw_tokens(*arrays))
