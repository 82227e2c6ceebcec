"""Products with planar matrices: which of three ways, by the number of rows of activations.

Up to 8 rows a kernel that reads every weight once and multiplies in registers, up to 64 one that decodes tiles for the
tensor cores (either may serve both, as the table of shapes says), above that plain numbers in a scratch and the
library's product. No float is ever added atomically: the same call gives the same bits.
"""

from typing import Final

import torch
from torch import Tensor

from kernels.gpu.dequantize import dequantize
from kernels.gpu.gemv import gemv
from kernels.gpu.launch import DTYPES, dot_type, plane_or, require_device
from kernels.gpu.launch_shapes import MOST_TILE_TOKENS, LaunchShape, bucket_of, launch_shape
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.tile_matmul import add_parts, tile_matmul

SCRATCH_BYTES: Final = 32 << 20
"""Plain numbers that are decoded at a time for the library's product: they stay in the second-level cache meanwhile."""

_ADD_SIZE: Final = 1024


def matmul(matrix: PlanarMatrix, x: Tensor, shape: LaunchShape | None = None, out: Tensor | None = None) -> Tensor:
    """x [T, columns] times the matrix transposed: [T, rows] in x's dtype (float32, float16 or bfloat16).

    Sums are float32. With up to 64 rows the result of a row depends on the others' number alone, never on their
    values or its place among them. shape: in place of the one that the table or the rule gives, for T <= 64. out: to
    write to instead of new memory; its rows may be part of wider ones.
    """
    num_tokens, columns = x.shape
    assert columns == matrix.columns, "activations of the wrong width"
    assert x.dtype in DTYPES, "activations of the wrong dtype"
    if out is None:
        out = torch.empty(num_tokens, matrix.rows, dtype=x.dtype, device=x.device)
    assert out.shape == (num_tokens, matrix.rows), "an output of the wrong shape"
    assert out.dtype == x.dtype, "an output of the wrong dtype"
    if out.numel() == 0:
        return out
    if columns == 0:
        return out.zero_()
    if num_tokens > MOST_TILE_TOKENS and shape is None:
        _scratch_matmul(matrix, x, out)
        return out
    require_device(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    if shape is None:
        shape = launch_shape(matrix.form, matrix.rows, columns, bucket_of(num_tokens), x.dtype, x.device)
    parts = out
    if shape.split > 1:
        parts = torch.empty(shape.split, *out.shape, dtype=torch.float32, device=x.device)
    launch = _launch_gemv if shape.kernel == "gemv" else _launch_tile
    launch(matrix, x, parts, shape)
    if shape.split > 1:
        _add(parts, out)
    return out


def _scratch_matmul(matrix: PlanarMatrix, x: Tensor, out: Tensor) -> None:
    step = max(1, SCRATCH_BYTES // (matrix.columns * x.element_size()))
    for first in range(0, matrix.rows, step):
        count = min(step, matrix.rows - first)
        weights = dequantize(matrix, x.dtype, first, count)
        torch.mm(x, weights.t(), out=out[:, first : first + count])


def _launch_gemv(matrix: PlanarMatrix, x: Tensor, out: Tensor, shape: LaunchShape) -> None:
    """out [T, rows], or [split, T, rows]."""
    low = matrix.low
    assert len(x) <= shape.tokens
    gemv[(-(-matrix.rows // shape.rows), shape.split)](
        x, low, plane_or(matrix.high, low), plane_or(matrix.sub, low), matrix.block, out,
        len(x), matrix.rows, matrix.columns // matrix.form.vector, x.stride(0), out.stride(-2), out.stride(0),
        MOST_X=shape.tokens, ROWS=shape.rows, VECS=shape.vectors, SPLIT=shape.split, STAGES=shape.stages,
        FORM=matrix.form, num_warps=shape.warps, enable_fp_fusion=True,
    )  # fmt: skip


def _launch_tile(matrix: PlanarMatrix, x: Tensor, out: Tensor, shape: LaunchShape) -> None:
    """out [T, rows], or [split, T, rows]."""
    low = matrix.low
    tile_matmul[(-(-matrix.rows // shape.rows), -(-len(x) // shape.tokens), shape.split)](
        x, low, plane_or(matrix.high, low), plane_or(matrix.sub, low), matrix.block, out,
        len(x), matrix.rows, matrix.columns // matrix.form.vector, x.stride(0), out.stride(-2), out.stride(0),
        TOKENS=shape.tokens, ROWS=shape.rows, VECS=shape.vectors, SPLIT=shape.split, FORM=matrix.form,
        DTYPE=DTYPES[x.dtype], DOT_DTYPE=dot_type(x.dtype),
        num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _add(parts: Tensor, out: Tensor) -> None:
    split, num_tokens, rows = parts.shape
    add_parts[(-(-num_tokens * rows // _ADD_SIZE),)](
        parts, out, num_tokens * rows, rows, out.stride(0), parts.stride(0),
        SPLIT=split, SIZE=_ADD_SIZE, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
