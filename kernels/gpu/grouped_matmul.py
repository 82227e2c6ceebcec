"""Products of a mixture of experts: each pair of token and choice by its expert's matrix, all experts in one launch.

Pairs are grouped by expert (routing.Groups). A program takes a tile of one expert's pairs and of its rows: packed
weights are decoded in registers, plain ones are loaded as they are, and both go to the tensor cores. A pair's result
depends neither on the other pairs nor on its place among them; no float is added atomically.
"""

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.activation import KINDS, activated, gate
from kernels.gpu.launch import DTYPES, IS_INTERPRETED, dot_type, plane_or, require_device
from kernels.gpu.launch_shapes import LaunchShape, grouped_shape
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PlanarForm
from kernels.gpu.planar_tile import decoded
from kernels.gpu.rounding import narrow
from kernels.gpu.routing import Groups
from kernels.gpu.support import num_cores

Matrix: TypeAlias = PlanarMatrix | Tensor
"""The experts' matrices one below the other, [E * rows, columns]: in planes, or plain numbers, contiguous, of the dtype
of activations or narrower than it."""


@triton.jit
def _weights(
    low, high, sub, block, rows, first, keep_rows, num_vectors,
    ROWS: tl.constexpr, VECS: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of weights from vector `first` on. FORM None: plain numbers in `low`, whose vectors are one number."""
    if FORM is None:
        column = first + tl.arange(0, VECS)
        keep = keep_rows[:, None] & (column < num_vectors)[None, :]
        tile = tl.load(low + rows[:, None] * num_vectors + column[None, :], mask=keep, other=0).to(DTYPE)
    else:
        tile = decoded(low, high, sub, block, rows, first, keep_rows, num_vectors, ROWS, VECS, FORM, DTYPE, False)
    return tile


@triton.jit
def grouped_matmul(
    x, low, high, sub, block, up_low, up_high, up_sub, up_block, out, who, starts, tile_starts,
    num_rows, num_vectors, x_stride, out_stride, split_stride, num_groups, pairs_a_row,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, VECS: tl.constexpr, VECTOR: tl.constexpr, SPLIT: tl.constexpr,
    FORM: tl.constexpr, DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr, IS_GATED: tl.constexpr, KIND: tl.constexpr,
    GROUP_BITS: tl.constexpr,
):  # fmt: skip
    """out[s, p, n] = Σ over part s of the columns of p's row of x times row n of p's expert; with IS_GATED f(gate) * up
    of two such sums over all columns. Grid: (row tiles, token tiles, SPLIT).

    Expert g has pairs starts[g] … starts[g + 1] - 1 and rows g * num_rows … of the matrix; its token tiles are
    tile_starts[g] … tile_starts[g + 1] - 1. Pair p is row who[p] // pairs_a_row of x and row who[p] of out.
    """
    tile = tl.program_id(1)
    if tile >= tl.load(tile_starts + num_groups):
        return
    # The last group that begins at or before this tile: groups without pairs have no tile.
    group = tl.zeros((), tl.int32)
    for bit in tl.static_range(GROUP_BITS):
        further = group + (1 << (GROUP_BITS - 1 - bit))
        start = tl.load(tile_starts + tl.minimum(further, num_groups))
        group = tl.where((further < num_groups) & (start <= tile), further, group)
    pair = tl.load(starts + group) + (tile - tl.load(tile_starts + group)) * TOKENS + tl.arange(0, TOKENS)
    keep_x = pair < tl.load(starts + group + 1)
    to = tl.load(who + pair, mask=keep_x, other=0).to(tl.int64)
    of = to // pairs_a_row
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep_rows = row < num_rows
    rows = group.to(tl.int64) * num_rows + row
    part = tl.program_id(2)
    vectors_a_part = tl.cdiv(tl.cdiv(num_vectors, VECS), SPLIT) * VECS
    begin = part * vectors_a_part
    end = tl.minimum(begin + vectors_a_part, num_vectors)
    column = tl.arange(0, VECS * VECTOR)
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    up_sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(begin, end, VECS):
        keep = keep_x[:, None] & (column < (num_vectors - first) * VECTOR)[None, :]
        tokens = tl.load(x + of[:, None] * x_stride + (first * VECTOR + column)[None, :], mask=keep, other=0)
        right = tl.trans(tokens).to(DOT_DTYPE)
        left = _weights(low, high, sub, block, rows, first, keep_rows, num_vectors, ROWS, VECS, FORM, DTYPE)
        sums = tl.dot(left.to(DOT_DTYPE), right, sums, input_precision="ieee")
        if IS_GATED:
            left = _weights(
                up_low, up_high, up_sub, up_block, rows, first, keep_rows, num_vectors, ROWS, VECS, FORM, DTYPE
            )
            up_sums = tl.dot(left.to(DOT_DTYPE), right, up_sums, input_precision="ieee")
    if IS_GATED:
        sums = activated(sums, KIND) * up_sums
    at = out + part.to(tl.int64) * split_stride + to[None, :] * out_stride + row[:, None]
    tl.store(at, narrow(sums, out.dtype.element_ty), mask=keep_rows[:, None] & keep_x[None, :])


@triton.jit
def _combine(
    parts, factors, out, num_tokens, split_stride,
    COLUMNS: tl.constexpr, TOP_K: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[t] = Σ over choices c, in order, of factors[t, c] * Σ over parts, in order, of parts[s, t * TOP_K + c]."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    keep = (row < num_tokens)[:, None] & (column < COLUMNS)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for choice in range(TOP_K):
        pair = row * TOP_K + choice
        factor = tl.load(factors + pair, mask=row < num_tokens, other=0.0)
        value = tl.zeros((ROWS, WIDTH), tl.float32)
        for part in range(SPLIT):
            at = parts + part * split_stride + pair[:, None] * COLUMNS + column[None, :]
            value += tl.load(at, mask=keep, other=0.0).to(tl.float32)
        total += factor[:, None] * value
    tl.store(out + row[:, None] * COLUMNS + column[None, :], narrow(total, out.dtype.element_ty), mask=keep)


def multiply(matrix: Matrix, x: Tensor, groups: Groups, out: Tensor | None = None) -> Tensor:
    """Each pair's row of x times the rows of its expert: [P, rows] in the order of the pairs, one launch.

    x [T, columns]: row t for the pairs t * choices, …; or [P, columns], a row for each pair. Sums are float32. out: to
    write to instead of new memory; its rows may be part of wider ones.
    """
    if out is None:
        out = x.new_empty(len(groups.who), _rows(matrix, groups))
    _launch(matrix, None, x, groups, out.unsqueeze(0), "")
    return out


def gated(gate_matrix: Matrix, up: Matrix, x: Tensor, groups: Groups, kind: str) -> Tensor:
    """f(gate(x)) * up(x) of each pair, [P, rows]: one launch where both matrices are of one type, else three."""
    num_pairs, rows = len(groups.who), _rows(up, groups)
    if _form(gate_matrix) is not _form(up) or _dtype(gate_matrix) != _dtype(up):
        both = x.new_empty(num_pairs, 2 * rows)
        multiply(gate_matrix, x, groups, both[:, :rows])
        multiply(up, x, groups, both[:, rows:])
        return gate(both, kind)
    out = x.new_empty(1, num_pairs, rows)
    _launch(gate_matrix, up, x, groups, out, kind)
    return out[0]


def combined(down: Matrix, inner: Tensor, groups: Groups, factors: Tensor) -> Tensor:
    """inner [P, columns], factors float32 [T, choices] → Σ over choices of factor * down(inner): [T, rows]."""
    num_tokens, top_k = factors.shape
    num_pairs, rows = len(inner), _rows(down, groups)
    assert num_pairs == num_tokens * top_k == len(groups.who)
    assert factors.is_contiguous()
    out = inner.new_empty(num_tokens, rows)
    if out.numel() == 0:
        return out
    split = _shape(down, groups, rows, inner, has_two=False).split
    # What is split is added up here: no launch of its own.
    parts = torch.empty(split, num_pairs, rows, dtype=inner.dtype if split == 1 else torch.float32, device=inner.device)
    _launch(down, None, inner, groups, parts, "")
    width = min(triton.next_power_of_2(rows), 4096 if IS_INTERPRETED else 512)
    a_program = max(1, (65536 if IS_INTERPRETED else 1024) // width)
    _combine[(triton.cdiv(num_tokens, a_program), triton.cdiv(rows, width))](
        parts, factors, out, num_tokens, parts.stride(0), COLUMNS=rows, TOP_K=top_k, SPLIT=split, ROWS=a_program,
        WIDTH=width,
    )  # fmt: skip
    return out


def _launch(matrix: Matrix, up: Matrix | None, x: Tensor, groups: Groups, out: Tensor, kind: str) -> None:
    """out [SPLIT, P, rows]. up: the second matrix of a gated product, of the first one's type."""
    num_pairs, num_experts, rows = len(groups.who), len(groups.starts) - 1, _rows(matrix, groups)
    columns = matrix.shape[1]
    assert x.shape[1] == columns, "activations of the wrong width"
    assert x.dtype in DTYPES, "activations of the wrong dtype"
    assert num_pairs == 0 or (len(x) > 0 and num_pairs % len(x) == 0), "pairs are a multiple of the tokens"
    assert out.shape[1:] == (num_pairs, rows), "an output of the wrong shape"
    assert up is None or (up.shape == matrix.shape and len(out) == 1), "gate and up of one size, in one part"
    if out.numel() == 0:
        return
    require_device(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    form, shape = _form(matrix), _shape(matrix, groups, rows, x, has_two=up is not None)
    vector = 1 if form is None else form.vector
    grid = (-(-rows // shape.rows), groups.num_tiles, len(out))
    grouped_matmul[grid](
        x, *_planes(matrix, x), *_planes(matrix if up is None else up, x), out, groups.who, groups.starts,
        groups.tile_starts, rows, columns // vector, x.stride(0), out.stride(1), out.stride(0), num_experts,
        num_pairs // len(x), TOKENS=groups.tokens, ROWS=shape.rows, VECS=shape.vectors, VECTOR=vector, SPLIT=len(out),
        FORM=form, DTYPE=DTYPES[x.dtype], DOT_DTYPE=dot_type(x.dtype), IS_GATED=up is not None,
        KIND=KINDS.index(kind) if kind else 0, GROUP_BITS=num_experts.bit_length(),
        num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _shape(matrix: Matrix, groups: Groups, rows: int, x: Tensor, *, has_two: bool) -> LaunchShape:
    return grouped_shape(
        _form(matrix), rows, matrix.shape[1], groups.tokens, groups.num_tiles, x.dtype, num_cores(x.device),
        has_two=has_two,
    )  # fmt: skip


def _form(matrix: Matrix) -> PlanarForm | None:
    return matrix.form if isinstance(matrix, PlanarMatrix) else None


def _dtype(matrix: Matrix) -> torch.dtype | None:
    return None if isinstance(matrix, PlanarMatrix) else matrix.dtype


def _planes(matrix: Matrix, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if isinstance(matrix, PlanarMatrix):
        return matrix.low, plane_or(matrix.high, matrix.low), plane_or(matrix.sub, matrix.low), matrix.block
    assert matrix.is_contiguous()
    assert x.dtype in (matrix.dtype, torch.float32), "weights wider than the activations"
    return matrix, matrix, matrix, matrix


def _rows(matrix: Matrix, groups: Groups) -> int:
    """Of one expert."""
    num_experts = len(groups.starts) - 1
    assert matrix.shape[0] % num_experts == 0, "experts are of one size"
    return matrix.shape[0] // num_experts
