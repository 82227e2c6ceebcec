"""Products of a planar matrix with up to 64 rows of activations at a time.

A program decodes a tile of weights in registers, rounds it to the dtype of the activations and hands it to the tensor
cores, which sum in float32. The weights are their left operand: their rows fill it, however few rows x has.
"""

import triton
import triton.language as tl

from kernels.gpu.planar_tile import decoded
from kernels.gpu.rounding import narrow


@triton.jit
def tile_matmul(
    x, low, high, sub, block, out, num_x, num_rows, num_vectors, x_stride, out_stride, split_stride,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, SPLIT: tl.constexpr, FORM: tl.constexpr,
    DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """out[s, t, n] = Σ over part s of the columns of x[t] times row n. Grid: (row tiles, token tiles, SPLIT).

    DTYPE: of weights and x; DOT_DTYPE: the same, but float32 in the interpreter, which cannot multiply bfloat16.
    """
    of = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    keep_x = of < num_x
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep_rows = rows < num_rows
    part = tl.program_id(2)
    vectors_a_part = tl.cdiv(tl.cdiv(num_vectors, VECS), SPLIT) * VECS
    begin = part * vectors_a_part
    end = tl.minimum(begin + vectors_a_part, num_vectors)
    column = tl.arange(0, VECS * FORM.vector)
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(begin, end, VECS):
        weights = decoded(low, high, sub, block, rows, first, keep_rows, num_vectors, ROWS, VECS, FORM, DTYPE, False)
        keep = keep_x[:, None] & (column < (num_vectors - first) * FORM.vector)[None, :]
        tokens = tl.load(x + of[:, None] * x_stride + (first * FORM.vector + column)[None, :], mask=keep, other=0)
        sums = tl.dot(weights.to(DOT_DTYPE), tl.trans(tokens).to(DOT_DTYPE), sums, input_precision="ieee")
    at = out + part.to(tl.int64) * split_stride + of[None, :] * out_stride + rows[:, None]
    tl.store(at, narrow(sums, out.dtype.element_ty), mask=keep_rows[:, None] & keep_x[None, :])


@triton.jit
def add_parts(parts, out, num_elements, row_length, out_stride, part_stride, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    """out = the sum of SPLIT parts [tokens, row_length] float32, always in the order of the parts."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    keep = i < num_elements
    total = tl.zeros((SIZE,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * part_stride + i, mask=keep, other=0)
    at = out + i // row_length * out_stride + i % row_length
    tl.store(at, narrow(total, out.dtype.element_ty), mask=keep)
