"""Planes to plain numbers: whole matrices, ranges of rows, and the rows that an embedding gathers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import DTYPES, IS_INTERPRETED, plane_or, require_device
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_tile import decoded

TILE_ROWS, TILE_VECTORS = (64, 32) if IS_INTERPRETED else (4, 16)


@triton.jit
def _dequantize(
    low, high, sub, block, ids, out, first_row, num_out, num_rows, num_vectors, out_stride,
    IS_GATHER: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Row i of out is row ids[i], or first_row + i, of the matrix. A program: ROWS rows of out, VECS vectors."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = i < num_out
    rows = first_row + i
    if IS_GATHER:
        rows = tl.load(ids + i, mask=keep, other=0)
        rows = tl.where((rows >= 0) & (rows < num_rows), rows, 0)
    first = tl.program_id(1) * VECS
    tile = decoded(low, high, sub, block, rows, first, keep, num_vectors, ROWS, VECS, FORM, DTYPE, True)
    column = first * FORM.vector + tl.arange(0, VECS * FORM.vector)
    here = keep[:, None] & (column < num_vectors * FORM.vector)[None, :]
    tl.store(out + i[:, None] * out_stride + column[None, :], tile, mask=here)


def dequantize(
    matrix: PlanarMatrix, dtype: torch.dtype = torch.float32, first: int = 0, count: int | None = None
) -> Tensor:
    """Rows first, first + 1, … as plain numbers [count, columns]: in float32 bit for bit the reference's, other dtypes
    rounded from it. IndexError for rows that the matrix does not have."""
    count = matrix.rows - first if count is None else count
    if not 0 <= first <= first + count <= matrix.rows:
        raise IndexError(f"rows {first} to {first + count} of a matrix of {matrix.rows}")
    out = torch.empty(count, matrix.columns, dtype=dtype, device=matrix.device)
    _launch(matrix, None, first, out)
    return out


def gather_rows(matrix: PlanarMatrix, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows ids [N] int64, on the matrix's device, as plain numbers [N, columns].

    An id outside the matrix gives row 0: the ids of a step's padding may be anything, and no step waits for a check.
    """
    out = torch.empty(len(ids), matrix.columns, dtype=dtype, device=matrix.device)
    _launch(matrix, ids.long().contiguous(), 0, out)
    return out


def _launch(matrix: PlanarMatrix, ids: Tensor | None, first: int, out: Tensor) -> None:
    if out.numel() == 0:
        return
    require_device(out)
    form = matrix.form
    num_vectors = matrix.columns // form.vector
    vectors = min(TILE_VECTORS, triton.next_power_of_2(num_vectors))
    rows = min(TILE_ROWS, triton.next_power_of_2(len(out)))
    grid = (triton.cdiv(len(out), rows), triton.cdiv(num_vectors, vectors))
    low = matrix.low
    _dequantize[grid](
        low, plane_or(matrix.high, low), plane_or(matrix.sub, low), matrix.block, plane_or(ids, low), out,
        first, len(out), matrix.rows, num_vectors, out.stride(0),
        IS_GATHER=ids is not None, ROWS=rows, VECS=vectors, FORM=form, DTYPE=DTYPES[out.dtype],
        num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip
