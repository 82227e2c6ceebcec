"""Products of a matrix of plain numbers with one to four rows of activations: every weight is read once.

A library's product is made for many rows. Here as in gemv.py a warp reads some rows of the matrix from begin to end,
and sums are formed over a thread's own columns.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import IS_INTERPRETED, require_device
from kernels.gpu.launch_shapes import gemv_tile
from kernels.gpu.rounding import narrow
from kernels.gpu.support import num_cores

# Kernels know no starred tuples, and grow them in loops.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

MOST_TOKENS: Final = 4
"""With more rows of activations the sums would no longer fit a thread's registers."""

_ROW_BYTES: Final = 512
"""What a warp reads of a row at a time: 16 bytes a thread."""


@triton.jit
def _dense_gemv(
    x, matrix, out, num_x, num_rows, num_columns, x_stride, matrix_stride, out_stride,
    MOST_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t, n] = Σ x[t] * matrix[n], num_x <= MOST_X. A program: ROWS rows of the matrix."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep_rows = rows < num_rows
    rows = rows.to(tl.int64)
    no_column = tl.zeros((COLUMNS,), tl.int32)
    no_row = tl.zeros((ROWS,), tl.int32)
    sums = ()
    for _t in tl.static_range(MOST_X):
        sums = sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    for first in range(0, num_columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        keep = column < num_columns
        at = matrix + rows[:, None] * matrix_stride + column[None, :]
        weights = tl.load(at, mask=keep_rows[:, None] & keep[None, :], other=0).to(tl.float32)
        new_sums = ()
        for t in tl.static_range(MOST_X):
            x_t = tl.load(x + t * x_stride + column, mask=keep & (t + no_column < num_x), other=0).to(tl.float32)
            new_sums = new_sums + (sums[t] + weights * x_t[None, :],)
        sums = new_sums
    for t in tl.static_range(MOST_X):
        y = narrow(tl.sum(sums[t], axis=1), out.dtype.element_ty)
        tl.store(out + t * out_stride + rows, y, mask=keep_rows & (t + no_row < num_x))


def matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """x [T, columns] times matrix [rows, columns] transposed: [T, rows], all of one float dtype, T <= 4.

    Sums are float32, and those of a row of x have the same bits whatever the other rows are. Rows are contiguous.
    """
    num_tokens, columns = x.shape
    assert num_tokens <= MOST_TOKENS
    assert columns == matrix.shape[1]
    assert x.dtype == matrix.dtype
    out = torch.empty(num_tokens, len(matrix), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    require_device(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width, warps = _tile(matrix, num_tokens)
    _dense_gemv[(-(-len(matrix) // rows),)](
        x, matrix, out, num_tokens, len(matrix), columns, x.stride(0), matrix.stride(0), out.stride(0),
        MOST_X=triton.next_power_of_2(num_tokens), ROWS=rows, COLUMNS=width, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _tile(matrix: Tensor, num_tokens: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program's step. Tokens decide about the rows, never about the order of sums."""
    rows, columns = matrix.shape
    if IS_INTERPRETED:
        return min(256, triton.next_power_of_2(rows)), min(256, triton.next_power_of_2(max(1, columns))), 1
    step = _ROW_BYTES // matrix.element_size()
    a_program, warps = gemv_tile(rows, num_cores(matrix.device), most_warps=max(1, columns // step))
    return a_program if num_tokens <= 2 else min(2, a_program), warps * step, warps
