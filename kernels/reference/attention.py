"""Paged causal attention in plain torch: the oracle of all backends, and what runs without native code.

Shapes: T tokens of R requests, N heads, K KV heads, D head_dim, B blocks of a request's table, S slots a block.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def paged_attention(
    q_TND: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_RB: Tensor,
    query_start: Sequence[int],
    context_lens: Sequence[int],
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Each query attends over its request's tokens up to its own: the last query is the context's last token.

    Caches [num_blocks, S, K, D]; query_start (R + 1 numbers) and context_lens (R) on the host. Returns [T, N * D] in
    q's dtype; scores, softmax and sums are formed in float32. Query head h reads KV head h // (N // K). scale: of the
    scores, None = D ** -0.5. softcap: bound of the scores, 0 = none. window: keys that a query sees, itself included,
    0 = all. k_scale, v_scale float32 [K]: what a head's cached numbers are multiplied with, None = 1.
    """
    out = torch.empty_like(q_TND)
    for r, context in enumerate(context_lens):
        begin, end = query_start[r], query_start[r + 1]
        if begin == end:
            continue
        block_size = k_cache.shape[1]
        # What no query sees is not read: those blocks may be another request's.
        first = max(0, context - (end - begin) - window + 1) if window else 0
        blocks = block_tables_RB[r, first // block_size : -(-context // block_size)].long()
        span = slice(first % block_size, first % block_size + context - first)
        k_CKD = _scaled(k_cache[blocks].flatten(0, 1)[span], k_scale)
        v_CKD = _scaled(v_cache[blocks].flatten(0, 1)[span], v_scale)
        rows = torch.arange(context - (end - begin), context, device=q_TND.device)
        keys = torch.arange(first, context, device=q_TND.device)
        visible_QC = keys <= rows.unsqueeze(1)
        if window:
            visible_QC &= keys > rows.unsqueeze(1) - window
        out[begin:end] = _attend(q_TND[begin:end], k_CKD, v_CKD, visible_QC, scale, softcap)
    return out.flatten(1)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Cached numbers [..., K, D] as float32."""
    return x.float() if scale is None else x.float() * scale.unsqueeze(-1)


def _scores(dots: Tensor, head_dim: int, scale: float | None, softcap: float) -> Tensor:
    scores = dots * (1.0 / math.sqrt(head_dim) if scale is None else scale)
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _attend(
    q_QND: Tensor, k_CKD: Tensor, v_CKD: Tensor, visible_QC: Tensor, scale: float | None, softcap: float
) -> Tensor:
    queries, n_heads, head_dim = q_QND.shape
    n_kv_heads = k_CKD.shape[1]
    q_KGQD = q_QND.float().view(queries, n_kv_heads, n_heads // n_kv_heads, head_dim).permute(1, 2, 0, 3)
    dots = torch.matmul(q_KGQD, k_CKD.permute(1, 2, 0).unsqueeze(1))
    scores = _scores(dots, head_dim, scale, softcap).masked_fill(~visible_QC, float("-inf"))
    out_KGQD = torch.matmul(scores.softmax(-1), v_CKD.transpose(0, 1).unsqueeze(1))
    return out_KGQD.permute(2, 0, 1, 3).reshape(queries, n_heads, head_dim).to(q_QND.dtype)


def paged_decode(
    q_RND: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_RB: Tensor,
    context_lens: Tensor,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """paged_attention where every request has exactly one query: all of them at once, without a loop.

    context_lens [R] on the device. Returns [R, N * D].
    """
    requests, n_heads, head_dim = q_RND.shape
    n_kv_heads = k_cache.shape[2]
    k_RCKD = _scaled(k_cache[block_tables_RB.long()].flatten(1, 2), k_scale)
    keys = torch.arange(k_RCKD.shape[1], device=q_RND.device)
    hidden_RC = keys >= context_lens.unsqueeze(1)
    if window:
        hidden_RC |= keys < context_lens.unsqueeze(1) - window
    # Zero, not only unweighted: slots that nobody wrote, or another request did, may hold NaN.
    v_RCKD = _scaled(v_cache[block_tables_RB.long()].flatten(1, 2), v_scale)
    v_RCKD = v_RCKD.masked_fill(hidden_RC[:, :, None, None], 0.0)
    q_RKGD = q_RND.float().view(requests, n_kv_heads, n_heads // n_kv_heads, head_dim)
    scores_RKGC = _scores(torch.matmul(q_RKGD, k_RCKD.permute(0, 2, 3, 1)), head_dim, scale, softcap)
    scores_RKGC = scores_RKGC.masked_fill(hidden_RC[:, None, None], float("-inf"))
    out_RKGD = torch.matmul(scores_RKGC.softmax(-1), v_RCKD.transpose(1, 2))
    return out_RKGD.reshape(requests, n_heads * head_dim).to(q_RND.dtype)
