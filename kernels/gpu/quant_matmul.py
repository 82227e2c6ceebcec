"""Products with planar matrices: which of three ways, by the number of rows of activations.

Up to 8 rows a kernel that reads every weight once and multiplies in registers, up to 64 one that decodes tiles for the
tensor cores (either may serve both, as the table of shapes says), above that plain numbers in a scratch and the
library's product. No float is ever added atomically: the same call gives the same bits.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kernels.gpu.dequantize import dequantize
from kernels.gpu.gemv import gemv
from kernels.gpu.launch import DTYPES, IS_INTERPRETED, plane_or, require_device
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


@dataclass(frozen=True, slots=True)
class Groups:
    """Which expert multiplies what: made once for the products of a layer, on the device, without waiting for it.

    who int64 [P]: the pairs (token, choice), by experts. starts int64 [E + 1]: where each expert's pairs begin.
    tile_starts int64 [E + 1]: where its tiles of `tokens` pairs do; num_tiles: as many as there can be.
    """

    who: Tensor
    starts: Tensor
    tile_starts: Tensor
    tokens: int
    num_tiles: int

    @staticmethod
    def of(experts: Tensor, num_experts: int) -> "Groups":
        """From experts int64 [T, choices]: the experts of each token, each in [0, num_experts)."""
        flat = experts.flatten()
        num_pairs = len(flat)
        tokens = 16
        while tokens < MOST_TILE_TOKENS and tokens * num_experts < num_pairs:
            tokens *= 2
        order = torch.argsort(flat, stable=True)
        bounds = torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype)
        starts = torch.searchsorted(flat[order], bounds)
        tiles = (starts[1:] - starts[:-1] + tokens - 1) // tokens
        tile_starts = torch.cat((tiles.new_zeros(1), tiles.cumsum(0)))
        most = min(num_pairs, num_experts) + num_pairs // tokens
        return Groups(order, starts, tile_starts, tokens, most)


def gather_matmul(matrix: PlanarMatrix, x: Tensor, groups: Groups) -> Tensor:
    """Each pair's row of x times the rows of its expert: [P, rows / E] in the order of the pairs, one launch.

    matrix: the experts' matrices one below the other. x [T, columns]: row t for the pairs t * choices, …; or [P,
    columns], a row for each pair. Sums and determinism as in matmul.
    """
    num_pairs, num_experts = len(groups.who), len(groups.starts) - 1
    assert matrix.rows % num_experts == 0, "experts are of one size"
    assert x.shape[1] == matrix.columns, "activations of the wrong width"
    assert x.dtype in DTYPES, "activations of the wrong dtype"
    assert num_pairs == 0 or (len(x) > 0 and num_pairs % len(x) == 0), "pairs are a multiple of the tokens"
    rows = matrix.rows // num_experts
    out = torch.empty(num_pairs, rows, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    require_device(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    shape = launch_shape(matrix.form, rows, matrix.columns, groups.tokens, x.dtype, x.device)
    assert shape.kernel == "tile"
    shape = LaunchShape("tile", groups.tokens, shape.rows, shape.vectors, 1, shape.warps, shape.stages)
    _launch_tile(matrix, x, out, shape, groups)
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


def _launch_tile(
    matrix: PlanarMatrix, x: Tensor, out: Tensor, shape: LaunchShape, groups: Groups | None = None
) -> None:
    """out [T, rows], or [split, T, rows]; with groups [P, rows of a group]."""
    low = matrix.low
    if groups is None:
        who = starts = tile_starts = low
        num_groups, rows, pairs_a_row, token_tiles = 1, matrix.rows, 1, -(-len(x) // shape.tokens)
    else:
        who, starts, tile_starts = groups.who, groups.starts, groups.tile_starts
        num_groups, token_tiles = len(starts) - 1, groups.num_tiles
        rows, pairs_a_row = matrix.rows // num_groups, len(who) // len(x)
    tile_matmul[(-(-rows // shape.rows), token_tiles, shape.split)](
        x, low, plane_or(matrix.high, low), plane_or(matrix.sub, low), matrix.block, out, who, starts, tile_starts,
        len(x), rows, matrix.columns // matrix.form.vector, x.stride(0), out.stride(-2), out.stride(0),
        num_groups, pairs_a_row,
        TOKENS=shape.tokens, ROWS=shape.rows, VECS=shape.vectors, SPLIT=shape.split, FORM=matrix.form,
        DTYPE=DTYPES[x.dtype], DOT_DTYPE=DTYPES[torch.float32 if IS_INTERPRETED else x.dtype],
        IS_GROUPED=groups is not None, GROUP_BITS=num_groups.bit_length(),
        num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _add(parts: Tensor, out: Tensor) -> None:
    split, num_tokens, rows = parts.shape
    add_parts[(-(-num_tokens * rows // _ADD_SIZE),)](
        parts, out, num_tokens * rows, rows, out.stride(0), parts.stride(0),
        SPLIT=split, SIZE=_ADD_SIZE, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
