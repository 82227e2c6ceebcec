"""Requests over a paged cache, for the tests of attention and of what writes the cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.reference.norm import kv_write
from serve_app.attention.device_batch import DeviceBatch
from serve_app.batch import ForwardBatch


@dataclass
class PagedCase:
    """A step: flat queries, and caches that hold each request's whole context in blocks out of order.

    k, v [sum of contexts, K, D] float32: what was written, before any rounding. Everything else as kernels take it.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def max_query_len(self) -> int:
        return int(self.query_start.diff().max())

    @property
    def host_lengths(self) -> tuple[list[int], list[int]]:
        return self.query_start.tolist(), self.context_lens.tolist()

    def exact(self) -> "PagedCase":
        """The same numbers in float32, as the caches hold them."""
        caches = []
        for cache, scale in ((self.k_cache, self.k_scale), (self.v_cache, self.v_scale)):
            numbers = cache.float()
            caches.append(numbers if scale is None else numbers * scale.unsqueeze(-1))
        return PagedCase(
            self.q.float(), *caches, self.block_tables, self.query_start, self.context_lens, None, None
        )  # fmt: skip


def make_case(
    requests: Sequence[tuple[int, int]],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    *,
    block_size: int = 16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    spread: float = 1.0,
) -> PagedCase:
    """requests: (queries, context) each, the queries being the context's last tokens. What nobody wrote is NaN."""
    generator = torch.Generator().manual_seed(seed)
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    counts = [-(-context // block_size) for _, context in requests]
    order = torch.randperm(sum(counts) + 2, generator=generator).to(torch.int32)
    tables = torch.zeros((len(requests), max([1, *counts])), dtype=torch.int32)
    shape = (len(order), block_size, n_kv_heads, head_dim)
    k_cache, v_cache = (torch.full(shape, torch.nan).to(kv_dtype) for _ in range(2))
    k_scale = v_scale = None
    if kv_dtype == torch.float8_e4m3fn:
        k_scale, v_scale = (torch.rand(n_kv_heads, generator=generator) * 0.05 + 0.01 for _ in range(2))
    used = 0
    for r, (count, (_, context)) in enumerate(zip(counts, requests, strict=True)):
        tables[r, :count] = order[used : used + count]
        used += count
        k, v = torch.randn(2, context, n_kv_heads, head_dim, generator=generator) * spread
        at = torch.arange(context)
        slots = tables[r].long()[at // block_size] * block_size + at % block_size
        kv_write(k.to(dtype), v.to(dtype), k_cache, v_cache, slots, k_scale, v_scale)
    starts = torch.tensor([0, *(queries for queries, _ in requests)]).cumsum(0).to(torch.int32)
    q = (torch.randn(int(starts[-1]), n_heads, head_dim, generator=generator) * spread).to(dtype)
    lengths = torch.tensor([context for _, context in requests], dtype=torch.int32)
    scales = [None if s is None else s.to(device) for s in (k_scale, v_scale)]
    parts = (t.to(device) for t in (q, k_cache, v_cache, tables, starts, lengths))
    return PagedCase(*parts, *scales)


@dataclass
class OneLayer:
    """A cache of one layer. See Cache."""

    k: list[Tensor]
    v: list[Tensor]
    k_scales: list[Tensor] | None
    v_scales: list[Tensor] | None
    groups: tuple[int, ...] = (0,)


def device_batch(case: PagedCase) -> DeviceBatch:
    """The case as a step of the engine; its tokens are in their slots already."""
    starts, lengths = (np.array(numbers, np.int32) for numbers in case.host_lengths)
    counts = np.diff(starts)
    tables = case.block_tables.cpu().numpy()
    positions = np.concatenate([np.arange(c - n, c) for c, n in zip(lengths, counts, strict=True)]).astype(np.int64)
    owner, size = np.repeat(np.arange(len(counts)), counts), case.k_cache.shape[1]
    host = ForwardBatch(
        token_ids=np.zeros(len(positions), np.int64),
        positions=positions,
        slot_mapping=tables[owner, positions // size].astype(np.int64) * size + positions % size,
        block_tables=tables,
        query_start=starts,
        context_lens=lengths,
        logit_index=np.arange(len(positions)),
        sample_rows=np.zeros(0, np.int64),
        sample_positions=np.zeros(0, np.int64),
        max_query_len=int(counts.max()),
        max_context_len=int(lengths.max()),
    )
    scales = ([case.k_scale], [case.v_scale]) if case.k_scale is not None else (None, None)
    return DeviceBatch.of(host, OneLayer([case.k_cache], [case.v_cache], *scales), case.q.device)
