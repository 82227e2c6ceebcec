"""The operations between the matrix products, on float32 tensors. See kernels.reference.layers for what each computes.

Rows may be strided where it is said; otherwise tensors are contiguous. `acts` names further destinations: the result in
forms that a product reads, each a kind (csrc/packed.h: 0 float32, 1 bfloat16, 2 and 3 8-bit) and its bytes, uint8
[T, act_row_bytes(kind, width)] at a multiple of 64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.cpu import _native

Acts = Sequence[tuple[int, Tensor]]

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu_erf": 2}
KV_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
"""What a cache holds, by its tensor's dtype; uint8 rows are 8-bit keys and values with their scales (csrc/kv.h)."""


def require(holds: bool) -> None:
    """Wrong shapes are our own mistakes."""
    assert holds, "a tensor handed to a native kernel has the wrong shape, dtype or strides"


def _rows(x: Tensor, tokens: int, width: int) -> bool:
    return x.shape == (tokens, width) and x.dtype == torch.float32 and (width == 1 or x.stride(1) == 1)


def _addresses(acts: Acts, tokens: int, width: int) -> list[tuple[int, int]]:
    for kind, data in acts:
        require(data.is_contiguous() and data.shape == (tokens, _native.act_row_bytes(kind, width)))
    return [(kind, data.data_ptr()) for kind, data in acts]


def norm(
    x: Tensor | None,
    weight: Tensor | None,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    is_layer_norm: bool = False,
    weight_offset: float = 0.0,
    acts: Acts = (),
    out: Tensor | None = None,
) -> Tensor:
    """Normalises x [T, H], or residual + x, which residual then holds, or residual as it is. Returns [T, H]."""
    some = residual if x is None else x
    assert some is not None
    tokens, width = some.shape
    if out is None:
        out = torch.empty((tokens, width))
    require(_rows(some, tokens, width) and _rows(out, tokens, width))
    require(residual is None or (_rows(residual, tokens, width) and residual.is_contiguous()))
    require(
        all(
            w is None or (w.shape == (width,) and w.is_contiguous() and w.dtype == torch.float32)
            for w in (weight, bias)
        )
    )
    _native.norm(
        0 if x is None else x.data_ptr(),
        0 if x is None else x.stride(0),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        is_layer_norm,
        weight_offset,
        epsilon,
        tokens,
        width,
        out.data_ptr(),
        out.stride(0),
        _addresses(acts, tokens, width),
    )
    return out


def activate(gate_up: Tensor, kind: str = "silu", *, is_gated: bool = True, acts: Acts = ()) -> Tensor:
    """gate_up [T, 2 * I], rows strided → f(gate) * up, [T, I]; not gated: [T, I] → f(x). kind: one of ACTIVATIONS."""
    tokens, columns = gate_up.shape
    width = columns // 2 if is_gated else columns
    require(_rows(gate_up, tokens, columns) and (not is_gated or columns % 2 == 0))
    out = torch.empty((tokens, width))
    _native.activate(
        gate_up.data_ptr(),
        gate_up.stride(0),
        tokens,
        width,
        ACTIVATIONS[kind],
        is_gated,
        out.data_ptr(),
        out.stride(0),
        _addresses(acts, tokens, width),
    )
    return out


def convert(x: Tensor, acts: Acts) -> None:
    """x [T, H], rows strided, to activations."""
    tokens, width = x.shape
    require(_rows(x, tokens, width))
    _native.convert(x.data_ptr(), x.stride(0), tokens, width, _addresses(acts, tokens, width))


def softcap(x: Tensor, cap: float) -> None:
    """x becomes cap * tanh(x / cap)."""
    require(x.is_contiguous() and x.dtype == torch.float32)
    _native.softcap(x.data_ptr(), x.numel(), cap)


def add(x: Tensor, y: Tensor) -> None:
    """x becomes x + y."""
    require(x.is_contiguous() and y.is_contiguous() and x.shape == y.shape and x.dtype == y.dtype == torch.float32)
    _native.add(x.data_ptr(), y.data_ptr(), x.numel())


def scale(x: Tensor, factor: float) -> None:
    """x becomes x * factor."""
    require(x.is_contiguous() and x.dtype == torch.float32)
    _native.scale(x.data_ptr(), x.numel(), factor)


def rope_kv(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None = None,
    *,
    table: Tensor | None = None,
    positions: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """Rotates q [T, n_heads, head_dim] and k [T, n_kv_heads, head_dim] in place, then appends k and v to the caches.

    Only the first dimension of q, k, v is strided. Without table and positions [T] int64 nothing is rotated, without
    caches [num_blocks, block_size, n_kv_heads, row] and slots [T] int64 nothing is appended.
    """
    tokens, n_kv_heads, head_dim = k.shape
    for heads in (q, k, v):
        require(heads is None or (heads.dtype == torch.float32 and heads.stride()[1:] == (head_dim, 1)))
    half = 0 if table is None else table.shape[1] // 2
    kv_type = num_slots = 0
    for cache in (k_cache, v_cache):
        if cache is not None:
            kv_type, num_slots = KV_CODES[cache.dtype], cache.shape[0] * cache.shape[1]
            row = _native.kv_row_bytes(kv_type, head_dim) // cache.element_size()
            require(
                cache.is_contiguous() and cache.shape[2:] == (n_kv_heads, row) and v is not None and slots is not None
            )
    for ids in (positions, slots):
        require(ids is None or (ids.shape == (tokens,) and ids.dtype == torch.int64 and ids.is_contiguous()))
    require(table is None or (table.is_contiguous() and table.dtype == torch.float32 and positions is not None))
    _native.rope_kv(
        0 if q is None else q.data_ptr(),
        k.data_ptr(),
        0 if v is None else v.data_ptr(),
        0 if q is None else q.stride(0),
        k.stride(0),
        0 if v is None else v.stride(0),
        0 if q is None else q.shape[1],
        n_kv_heads,
        head_dim,
        half,
        0 if table is None else table.data_ptr(),
        0 if table is None else table.shape[0],
        0 if positions is None else positions.data_ptr(),
        0 if slots is None else slots.data_ptr(),
        num_slots,
        0 if k_cache is None else k_cache.data_ptr(),
        0 if v_cache is None else v_cache.data_ptr(),
        kv_type,
        tokens,
    )
