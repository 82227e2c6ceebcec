"""Products of a planar matrix with one to eight rows of activations: every weight is read once.

A program has ROWS rows of the matrix and goes through their vectors VECS at a time. The sums of all rows of x are
formed at once, each over a thread's own columns, and only at the end across threads.
"""

# Kernels know no starred tuples, and grow them in loops.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from kernels.gpu.planar_tile import code, factor, load_block_numbers, load_words, per_word, run_numbers
from kernels.gpu.rounding import narrow


@triton.jit
def gemv(
    x, low, high, sub, block, out, num_x, num_rows, num_vectors, x_stride, out_stride, split_stride,
    MOST_X: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """out[s, t, n] = Σ over part s of the columns of x[t] times row n. Grid: (row tiles, SPLIT).

    num_x <= MOST_X rows of x. Part s of SPLIT is written at out + s * split_stride.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep_rows = rows < num_rows
    rows = rows.to(tl.int64)
    part = tl.program_id(1)
    vectors_a_part = tl.cdiv(tl.cdiv(num_vectors, VECS), SPLIT) * VECS
    begin = part * vectors_a_part
    end = tl.minimum(begin + vectors_a_part, num_vectors)
    word = tl.arange(0, 4 * VECS)
    column = word // 4 * FORM.vector + word % 4
    no_word = tl.zeros((4 * VECS,), tl.int32)
    no_row = tl.zeros((ROWS,), tl.int32)

    FIELDS: tl.constexpr = FORM.fields
    FIELDS_A_RUN: tl.constexpr = min(FORM.fields, FORM.run // 4)
    sums = ()
    for _t in tl.static_range(MOST_X):
        sums = sums + (tl.zeros((ROWS, 4 * VECS), tl.float32),)
    for first in tl.range(begin, end, VECS, num_stages=STAGES):
        words, high_words = load_words(low, high, rows, first, keep_rows, num_vectors * 4, FORM, VECS)
        d, second = load_block_numbers(block, rows, first, keep_rows, num_vectors, FORM, VECS)
        keep_x = word < (num_vectors - first) * 4
        for run in tl.static_range(FIELDS // FIELDS_A_RUN):
            scale, minimum = run_numbers(sub, d, second, rows, first, keep_rows, num_vectors, run, FORM, VECS)
            scale = per_word(scale, ROWS, VECS)
            minimum = per_word(minimum, ROWS, VECS)
            dots = ()
            totals = ()
            for _t in tl.static_range(MOST_X):
                dots = dots + (tl.zeros((ROWS, 4 * VECS), tl.float32),)
                totals = totals + (tl.zeros((4 * VECS,), tl.float32),)
            for i in tl.static_range(FIELDS_A_RUN):
                codes = code(words, high_words, run * FIELDS_A_RUN + i, FORM, 0)
                here = x + first * FORM.vector + column + 4 * (run * FIELDS_A_RUN + i)
                new_dots = ()
                new_totals = ()
                for t in tl.static_range(MOST_X):
                    x_t = tl.load(here + t * x_stride, mask=keep_x & (t + no_word < num_x), other=0).to(tl.float32)
                    scaled = x_t * factor(run * FIELDS_A_RUN + i, FORM)
                    new_dots = new_dots + (dots[t] + codes * scaled[None, :],)
                    new_totals = new_totals + (totals[t] + x_t,)
                dots = new_dots
                totals = new_totals
            new_sums = ()
            for t in tl.static_range(MOST_X):
                total = sums[t] + scale * dots[t]
                if FORM.second != 0 or FORM.offset != 0:
                    total -= minimum * totals[t][None, :]
                new_sums = new_sums + (total,)
            sums = new_sums
    at = out + part.to(tl.int64) * split_stride + rows
    for t in tl.static_range(MOST_X):
        y = tl.sum(sums[t], axis=1)
        tl.store(at + t * out_stride, narrow(y, out.dtype.element_ty), mask=keep_rows & (t + no_row < num_x))
