"""Keys and values into their slots, rotated on the way, in one pass over the step's queries, keys and values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import IS_INTERPRETED, require_device
from kernels.gpu.rounding import byte_view, e4m3_bits, narrow


@triton.jit
def _angles(table, position, offsets, mask, HALF: tl.constexpr):
    at = table + position[:, None] * (2 * HALF) + offsets[None, :]
    return tl.load(at, mask=mask, other=1.0), tl.load(at + HALF, mask=mask, other=0.0)


@triton.jit
def _put(cache, at, x, inverse_scale, mask, IS_FP8: tl.constexpr):
    if IS_FP8:
        tl.store(cache + at, e4m3_bits(x * inverse_scale), mask=mask)
    else:
        tl.store(cache + at, narrow(x, cache.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_queries(
    program,
    q,
    positions,
    table,
    num_tokens,
    q_stride,
    N_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = program * ROWS + tl.arange(0, ROWS)
    token, head = row // N_HEADS, row % N_HEADS
    is_row = token < num_tokens
    pair = tl.arange(0, PAIRS)
    mask = is_row[:, None] & (pair < HALF)[None, :]
    position = tl.load(positions + token, mask=is_row, other=0)
    cosine, sine = _angles(table, position, pair, mask, HALF)
    second = pair + HALF
    base = q + token.to(tl.int64)[:, None] * q_stride + head[:, None] * HEAD_DIM
    a = tl.load(base + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + second[None, :], mask=mask, other=0.0).to(tl.float32)
    # One thread reads and writes both of a pair: no other may see half of it.
    tl.store(base + pair[None, :], narrow(a * cosine - b * sine, q.dtype.element_ty), mask=mask)
    tl.store(base + second[None, :], narrow(b * cosine + a * sine, q.dtype.element_ty), mask=mask)


@triton.jit
def _write_keys_and_values(
    program,
    k,
    v,
    positions,
    table,
    k_cache,
    v_cache,
    slots,
    k_scale,
    v_scale,
    num_tokens,
    k_stride,
    v_stride,
    slot_stride,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    row = program * ROWS + tl.arange(0, ROWS)
    token, head = row // N_KV_HEADS, row % N_KV_HEADS
    is_row = token < num_tokens
    slot = tl.load(slots + token, mask=is_row, other=-1)
    # A token that only fills up a batch has no slot.
    is_row = is_row & (slot >= 0)
    to = slot[:, None] * slot_stride + head[:, None] * HEAD_DIM
    k_inverse = 1.0
    v_inverse = 1.0
    if IS_FP8:
        k_inverse = (1.0 / tl.load(k_scale + head, mask=is_row, other=1.0))[:, None]
        v_inverse = (1.0 / tl.load(v_scale + head, mask=is_row, other=1.0))[:, None]
    k_base = k + token.to(tl.int64)[:, None] * k_stride + head[:, None] * HEAD_DIM
    if HALF > 0:
        pair = tl.arange(0, PAIRS)
        turned = is_row[:, None] & (pair < HALF)[None, :]
        position = tl.load(positions + token, mask=is_row, other=0)
        cosine, sine = _angles(table, position, pair, turned, HALF)
        second = pair + HALF
        a = tl.load(k_base + pair[None, :], mask=turned, other=0.0).to(tl.float32)
        b = tl.load(k_base + second[None, :], mask=turned, other=0.0).to(tl.float32)
        # Rounded as if the rotated keys had been kept in between.
        c = narrow(a * cosine - b * sine, k.dtype.element_ty).to(tl.float32)
        d = narrow(b * cosine + a * sine, k.dtype.element_ty).to(tl.float32)
        _put(k_cache, to + pair[None, :], c, k_inverse, turned, IS_FP8)
        _put(k_cache, to + second[None, :], d, k_inverse, turned, IS_FP8)
    column = tl.arange(0, WIDTH)
    mask = is_row[:, None] & (column < HEAD_DIM)[None, :]
    if 2 * HALF < HEAD_DIM:
        rest = mask & (column >= 2 * HALF)[None, :]
        x = tl.load(k_base + column[None, :], mask=rest, other=0.0).to(tl.float32)
        _put(k_cache, to + column[None, :], x, k_inverse, rest, IS_FP8)
    v_base = v + token.to(tl.int64)[:, None] * v_stride + head[:, None] * HEAD_DIM
    y = tl.load(v_base + column[None, :], mask=mask, other=0.0).to(tl.float32)
    _put(v_cache, to + column[None, :], y, v_inverse, mask, IS_FP8)


@triton.jit
def _rope_kv(
    q,
    k,
    v,
    positions,
    table,
    k_cache,
    v_cache,
    slots,
    k_scale,
    v_scale,
    num_tokens,
    q_programs,
    q_stride,
    k_stride,
    v_stride,
    slot_stride,
    N_HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """The first q_programs programs rotate ROWS heads of queries each, the others write as many of keys and values."""
    program = tl.program_id(0)
    if program < q_programs:
        _rotate_queries(program, q, positions, table, num_tokens, q_stride, N_HEADS, HEAD_DIM, HALF, PAIRS, ROWS)
    else:
        _write_keys_and_values(
            program - q_programs, k, v, positions, table, k_cache, v_cache, slots, k_scale, v_scale, num_tokens,
            k_stride, v_stride, slot_stride, N_KV_HEADS, HEAD_DIM, HALF, PAIRS, WIDTH, ROWS, IS_FP8,
        )  # fmt: skip


def rope_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rotates q [T, n_heads, head_dim] in place, and writes rotated k and v [T, n_kv_heads, head_dim] into slots.

    See reference.norm's rope and kv_write, which this is in one; k itself stays as it was. Heads lie side by side, only
    the first dimension is strided. Without a table nothing is rotated. A token whose slot is
    negative is not written. Caches of float8_e4m3fn need k_scale and v_scale float32 [n_kv_heads].
    """
    num_tokens, n_kv_heads, head_dim = k.shape
    n_heads = 0 if table is None else q.shape[1]
    half = 0 if table is None else table.shape[1] // 2
    is_fp8 = k_cache.dtype == torch.float8_e4m3fn
    assert k.stride()[1:] == v.stride()[1:] == (head_dim, 1), "heads must lie side by side"
    assert q.stride()[1:] == (head_dim, 1), "heads must lie side by side"
    assert all(cache.is_contiguous() and cache.shape[2:] == (n_kv_heads, head_dim) for cache in (k_cache, v_cache))
    assert not is_fp8 or (k_scale is not None and v_scale is not None), "an e4m3 cache needs its scales"
    if num_tokens == 0:
        return
    require_device(k)
    width = triton.next_power_of_2(head_dim)
    rows = 256 if IS_INTERPRETED else max(1, 1024 // width)
    q_programs = triton.cdiv(num_tokens * n_heads, rows)
    _rope_kv[(q_programs + triton.cdiv(num_tokens * n_kv_heads, rows),)](
        q, k, v, positions, k if table is None else table,
        byte_view(k_cache), byte_view(v_cache), slots, k_scale if is_fp8 else k, v_scale if is_fp8 else v,
        num_tokens, q_programs, q.stride(0), k.stride(0), v.stride(0), n_kv_heads * head_dim,
        N_HEADS=max(1, n_heads), N_KV_HEADS=n_kv_heads, HEAD_DIM=head_dim, HALF=half,
        PAIRS=triton.next_power_of_2(max(1, half)), WIDTH=width, ROWS=rows, IS_FP8=is_fp8,
    )  # fmt: skip
