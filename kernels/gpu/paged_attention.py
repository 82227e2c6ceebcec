"""Paged causal attention with online softmax, for decodes, prefills and both at once.

A program takes one tile of rows (queries of one request, times the query heads that share a KV head) and one part of
the keys that they see. With several parts, each leaves its maximum, its sum and its weighted values, and a second
kernel merges them in order. Source: Dao et al. 2022 (FlashAttention), algorithm 1; Dao et al. 2023 (Flash-Decoding).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_plan import AttentionPlan
from kernels.gpu.launch import IS_INTERPRETED, dot_type, require_device
from kernels.gpu.rounding import narrow

LOG2_E = 1.4426950408889634


@triton.jit
def _tanh(x):
    """To float32's precision: near 0 by its series, where 1 - exp(-2|x|) would lose the leading bits."""
    square = x * x
    series = -0.05396825396825397 + square * 0.021869488536155203
    series = x * (1.0 + square * (-0.3333333333333333 + square * (0.13333333333333333 + square * series)))
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -1.0 * far, far))


@triton.jit
def _attend(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_start,
    context_lens,
    tile_request,
    k_scale,
    v_scale,
    out,
    part_out,
    part_max,
    part_sum,
    num_tokens,
    num_parts,
    scale,
    softcap,
    window,
    q_stride,
    table_stride,
    block_stride,
    slot_stride,
    N_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DOT: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_ONE_TILE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Program (tile, KV head, part). scale is that of the scores, times log2(e) where there is no softcap."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    if IS_ONE_TILE:
        request = tile
        first_query = 0
    else:
        request = tl.load(tile_request + tile)
        first_query = (tile - tl.load(query_start + request) // QUERIES - request) * QUERIES
    begin = tl.load(query_start + request)
    num_queries = tl.load(query_start + request + 1) - begin
    if first_query >= num_queries:
        return
    context = tl.load(context_lens + request)

    row = tl.arange(0, ROWS)
    query = first_query + row // GROUP
    is_row = (row < QUERIES * GROUP) & (query < num_queries)
    token = (begin + query).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    # The last query is the context's last token.
    position = context - num_queries + query
    column = tl.arange(0, WIDTH)
    is_column = column < HEAD_DIM
    row_mask = is_row[:, None] & is_column[None, :]
    at = token[:, None] * q_stride + head[:, None] * HEAD_DIM + column[None, :]
    queries = tl.load(q + at, mask=row_mask, other=0.0).to(DOT)

    # Keys that some row of the tile sees, in whole tiles counted from the context's begin, and this part's of them.
    last_key = tl.minimum(context - num_queries + tl.minimum(first_query + QUERIES, num_queries), context)
    first_tile = 0
    first_key = 0
    if HAS_WINDOW:
        # Blocks wholly before it were given up: others may be writing them.
        first_key = tl.maximum(context - num_queries + first_query - window + 1, 0)
        first_tile = first_key // KEYS
    end_tile = tl.cdiv(last_key, KEYS)
    if IS_SPLIT:
        share = tl.cdiv(end_tile - first_tile, num_parts)
        first_tile = first_tile + part * share
        end_tile = tl.minimum(first_tile + share, end_tile)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, WIDTH], tl.float32)
    score_scale = scale
    if IS_FP8:
        score_scale = scale * tl.load(k_scale + kv_head)
    table = block_tables + request.to(tl.int64) * table_stride
    for key_tile in range(first_tile, end_tile):
        key = key_tile * KEYS + tl.arange(0, KEYS)
        is_key = (key >= first_key) & (key < last_key)
        block = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        slot = block * block_stride + (key % BLOCK_SIZE) * slot_stride + kv_head * HEAD_DIM
        k_tile = tl.load(
            k_cache + slot[None, :] + column[:, None], mask=is_key[None, :] & is_column[:, None], other=0.0
        )
        scores = tl.dot(queries, k_tile.to(DOT), input_precision="ieee") * score_scale
        if HAS_SOFTCAP:
            scores = softcap * _tanh(scores / softcap) * 1.4426950408889634
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(largest - reference)
        total = total * decay + tl.sum(weights, axis=1)
        # Slots that nobody wrote may hold NaN: they are read as zero.
        v_tile = tl.load(
            v_cache + slot[:, None] + column[None, :], mask=is_key[:, None] & is_column[None, :], other=0.0
        )
        values = values * decay[:, None]
        values = tl.dot(weights.to(DOT), v_tile.to(DOT), acc=values, input_precision="ieee")
        largest = new_largest

    if IS_FP8:
        values = values * tl.load(v_scale + kv_head)
    if IS_SPLIT:
        place = (part.to(tl.int64) * num_tokens + token) * N_HEADS + head
        tl.store(part_max + place, largest, mask=is_row)
        tl.store(part_sum + place, total, mask=is_row)
        tl.store(part_out + place[:, None] * HEAD_DIM + column[None, :], values, mask=row_mask)
    else:
        # A request without context, which only fills up a batch, gets zeros.
        result = values / tl.where(total == 0.0, 1.0, total)[:, None]
        to = (token[:, None] * N_HEADS + head[:, None]) * HEAD_DIM + column[None, :]
        tl.store(out + to, narrow(result, out.dtype.element_ty), mask=row_mask)


@triton.jit
def _merge(
    part_out,
    part_max,
    part_sum,
    out,
    num_places,
    num_parts,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merges the parts of ROWS places (a token's query head each), first part first."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_place = place < num_places
    column = tl.arange(0, WIDTH)
    mask = is_place[:, None] & (column < HEAD_DIM)[None, :]
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, WIDTH], tl.float32)
    at = place.to(tl.int64)
    for _ in range(num_parts):
        part_largest = tl.load(part_max + at, mask=is_place, other=float("-inf"))
        new_largest = tl.maximum(largest, part_largest)
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        old, new = tl.exp2(largest - reference), tl.exp2(part_largest - reference)
        total = total * old + tl.load(part_sum + at, mask=is_place, other=0.0) * new
        more = tl.load(part_out + at[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
        values = values * old[:, None] + more * new[:, None]
        largest = new_largest
        at += num_places
    result = values / tl.where(total == 0.0, 1.0, total)[:, None]
    to = place.to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
    tl.store(out + to, narrow(result, out.dtype.element_ty), mask=mask)


def attend(
    plan: AttentionPlan,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """One layer of a planned step; see reference.attention.paged_attention. Returns [T, n_heads * head_dim].

    q's heads lie side by side, only its first dimension is strided. Caches of float8_e4m3fn need k_scale and v_scale,
    float32 [n_kv_heads] on the device. Rows of no request are left as they come.
    """
    num_tokens, n_heads, head_dim = q.shape
    n_kv_heads = k_cache.shape[2]
    is_fp8 = k_cache.dtype == torch.float8_e4m3fn
    assert q.stride()[1:] == (head_dim, 1), "heads must lie side by side"
    assert num_tokens == plan.num_tokens
    assert all(cache.is_contiguous() for cache in (k_cache, v_cache))
    assert k_cache.shape == v_cache.shape
    assert not is_fp8 or (k_scale is not None and v_scale is not None), "an e4m3 cache needs its scales"
    out = q.new_empty((num_tokens, n_heads * head_dim))
    if num_tokens == 0:
        return out
    require_device(q)
    tiles, parts = plan.tiles, plan.num_parts
    part_out = part_max = part_sum = out
    if parts > 1:
        part_out = torch.empty((parts, num_tokens, n_heads, head_dim), dtype=torch.float32, device=q.device)
        part_max, part_sum = torch.empty((2, parts, num_tokens, n_heads), dtype=torch.float32, device=q.device)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    _attend[(plan.num_tiles, n_kv_heads, parts)](
        q, k_cache, v_cache, plan.block_tables, plan.query_start, plan.context_lens,
        plan.query_start if plan.tile_request is None else plan.tile_request,
        k_scale if is_fp8 else q, v_scale if is_fp8 else q, out, part_out, part_max, part_sum,
        num_tokens, parts, scale if softcap else scale * LOG2_E, softcap, window,
        q.stride(0), plan.block_tables.stride(0), k_cache.stride(0), k_cache.stride(1),
        N_HEADS=n_heads, GROUP=n_heads // n_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=plan.block_size,
        QUERIES=tiles.queries, ROWS=tiles.rows, KEYS=tiles.keys, WIDTH=tiles.width, DOT=dot_type(q.dtype),
        IS_FP8=is_fp8, HAS_SOFTCAP=softcap != 0.0, HAS_WINDOW=window != 0, IS_ONE_TILE=plan.tile_request is None,
        IS_SPLIT=parts > 1, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if parts > 1:
        places = num_tokens * n_heads
        rows = 256 if IS_INTERPRETED else max(1, 512 // tiles.width)
        _merge[(triton.cdiv(places, rows),)](
            part_out, part_max, part_sum, out, places, parts, HEAD_DIM=head_dim, WIDTH=tiles.width, ROWS=rows
        )
    return out
