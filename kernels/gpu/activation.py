"""Activation functions, alone and as the gate of a feed-forward layer: one pass instead of three."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import IS_INTERPRETED, require_device
from kernels.gpu.rounding import narrow

KINDS = ("silu", "gelu_tanh", "gelu_erf")


@triton.jit
def activated(x, KIND: tl.constexpr):
    """f(x), float32; KIND: its place in KINDS."""
    if KIND == 0:
        y = x * tl.sigmoid(x)
    elif KIND == 1:
        # 1 + tanh(y) = 2 sigmoid(2y)
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y


@triton.jit
def _activate(
    x,
    out,
    num_rows,
    x_stride,
    out_stride,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    mask = (row < num_rows) & (column < COLUMNS)
    at = x + row.to(tl.int64) * x_stride + column
    result = activated(tl.load(at, mask=mask, other=0.0).to(tl.float32), KIND)
    if IS_GATED:
        result *= tl.load(at + COLUMNS, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * out_stride + column, narrow(result, out.dtype.element_ty), mask=mask)


def _run(x: Tensor, columns: int, kind: str, *, is_gated: bool) -> Tensor:
    num_rows = x.shape[0]
    out = x.new_empty((num_rows, columns))
    if num_rows == 0:
        return out
    assert x.stride(1) == 1, "rows must be contiguous"
    require_device(x)
    width = min(triton.next_power_of_2(columns), 4096 if IS_INTERPRETED else 1024)
    rows = max(1, (65536 if IS_INTERPRETED else 1024) // width)
    _activate[(triton.cdiv(num_rows, rows), triton.cdiv(columns, width))](
        x, out, num_rows, x.stride(0), columns, COLUMNS=columns, WIDTH=width, ROWS=rows, KIND=KINDS.index(kind),
        IS_GATED=is_gated,
    )  # fmt: skip
    return out


def activate(x: Tensor, kind: str) -> Tensor:
    """See reference.norm.activate; x [T, I], its rows may be strided."""
    return _run(x, x.shape[1], kind, is_gated=False)


def gate(gate_up: Tensor, kind: str) -> Tensor:
    """See reference.norm.gate; gate_up [T, 2 * I], its rows may be strided."""
    return _run(gate_up, gate_up.shape[1] // 2, kind, is_gated=True)
