"""RMS norm, with the addition to the residual before it, and layer norm: one pass over each row."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import IS_INTERPRETED, require_device
from kernels.gpu.rounding import narrow


@triton.jit
def _norm(
    x,
    residual,
    out,
    weight,
    bias,
    epsilon,
    offset,
    num_rows,
    inner,
    x_outer,
    x_inner,
    out_outer,
    out_inner,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_LAYER_NORM: tl.constexpr,
):
    """Row r lies at (r // inner) * outer stride + (r % inner) * inner stride; residual rows are contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    mask = (row < num_rows)[:, None] & (column < COLUMNS)
    group, member = (row // inner).to(tl.int64)[:, None], (row % inner)[:, None]
    values = tl.load(x + group * x_outer + member * x_inner + column, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        at = residual + row.to(tl.int64)[:, None] * COLUMNS + column
        values += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        kept = narrow(values, residual.dtype.element_ty)
        tl.store(at, kept, mask=mask)
        # What is normalised is the sum as it is kept.
        values = kept.to(tl.float32)
    scales = tl.load(weight + column, mask=column < COLUMNS, other=0.0) + offset
    if IS_LAYER_NORM:
        mean = tl.sum(values, axis=1) / COLUMNS
        values = tl.where(mask, values - mean[:, None], 0.0)
    square = tl.sum(values * values, axis=1) / COLUMNS
    result = values * tl.rsqrt(square + epsilon)[:, None] * scales
    if HAS_BIAS:
        result += tl.load(bias + column, mask=column < COLUMNS, other=0.0)
    tl.store(out + group * out_outer + member * out_inner + column, narrow(result, out.dtype.element_ty), mask=mask)


def _run(
    x: Tensor,
    residual: Tensor | None,
    out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    offset: float,
    *,
    is_layer_norm: bool,
) -> Tensor:
    """x and out [..., H], of at most three dimensions, the last one contiguous."""
    columns = x.shape[-1]
    num_rows = x.numel() // columns
    if num_rows == 0:
        return out
    assert x.stride(-1) == out.stride(-1) == 1, "rows must be contiguous"
    require_device(x)
    width = triton.next_power_of_2(columns)
    inner = x.shape[1] if x.dim() == 3 else 1
    steps = [(t.stride(0), t.stride(1) if t.dim() == 3 else 0) for t in (x, out)]
    rows = max(1, (65536 if IS_INTERPRETED else 1024) // width)
    _norm[(triton.cdiv(num_rows, rows),)](
        x, x if residual is None else residual, out, weight, weight if bias is None else bias, epsilon, offset,
        num_rows, inner, *steps[0], *steps[1], COLUMNS=columns, WIDTH=width, ROWS=rows, ADDS=residual is not None,
        HAS_BIAS=bias is not None, IS_LAYER_NORM=is_layer_norm, num_warps=8 if width > 4096 else 4,
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, out: Tensor | None = None) -> Tensor:
    """See reference.norm.rms_norm; weights are weight + offset. x [T, H] or [T, heads, H]; out may be x itself."""
    return _run(x, None, _out(x) if out is None else out, weight, None, epsilon, offset, is_layer_norm=False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0) -> Tensor:
    """See reference.norm.add_rms_norm; residual [T, H] contiguous."""
    assert residual.is_contiguous()
    assert residual.shape == x.shape
    return _run(x, residual, _out(x), weight, None, epsilon, offset, is_layer_norm=False)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    *,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """See reference.norm.layer_norm; x is first added to residual, where there is one, in place."""
    assert residual is None or (residual.is_contiguous() and residual.shape == x.shape)
    return _run(x, residual, _out(x), weight, bias, epsilon, offset, is_layer_norm=True)


def _out(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
