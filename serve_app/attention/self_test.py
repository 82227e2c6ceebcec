"""A small step through a backend, against plain torch in float32: what loads may still compute something else."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from kernels.reference.attention import paged_attention
from kernels.reference.norm import kv_write
from serve_app.attention.backend import AttentionBackend, AttentionNeeds, AttentionShape
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.slot_write import write_slots
from serve_app.batch import ForwardBatch

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of results that are averages of numbers of size 1; a wrong mask or block is off by tenths."""

STEPS = {"a prefill beside a decode": (1, 5), "decodes alone": (1, 1)}
"""Queries of the two requests: decodes alone take other kernels, and are what graphs are made of."""


@dataclass(slots=True)
class SmallCache:
    """A cache of one layer. See Cache."""

    k: list[Tensor]
    v: list[Tensor]
    k_scales: list[Tensor] | None
    v_scales: list[Tensor] | None
    groups: tuple[int, ...] = (0,)


def failure(backend: AttentionBackend, needs: AttentionNeeds) -> str | None:
    """What is wrong with a backend's numbers, for each kind of layer that the model has; None where nothing is."""
    kinds = {(s.n_heads, s.n_kv_heads, s.head_dim, s.softcap, bool(s.window)): s for s in needs.shapes}
    for shape, (step, queries) in product(kinds.values(), STEPS.items()):
        try:
            error = _error(backend, needs, shape, queries)
        except Exception as problem:
            first = (str(problem).splitlines() or [""])[0]
            return f"its self-test of {step} fails with {type(problem).__name__}: {first}"
        if not error <= TOLERANCE[needs.dtype]:
            return f"its self-test of {step} is off by {error:.2g}"
    return None


def _error(backend: AttentionBackend, needs: AttentionNeeds, shape: AttentionShape, queries: tuple[int, int]) -> float:
    """A request in its second block and one behind some tokens; blocks out of order."""
    device, size = needs.device, needs.block_size
    window = min(shape.window, size // 2)
    shape = AttentionShape(
        0, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.head_dim**-0.5, shape.softcap, window
    )
    host = _batch(size, queries)
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, shape.head_dim, generator=generator).to(device, needs.dtype)

    cache_shape = (4, size, shape.n_kv_heads, shape.head_dim)
    k_cache, v_cache = (torch.zeros(cache_shape, dtype=needs.kv_dtype, device=device) for _ in "kv")
    scale = torch.full((shape.n_kv_heads,), 0.02, device=device)
    scales = [scale] if needs.is_fp8 else None
    batch = DeviceBatch.of(host, SmallCache([k_cache], [v_cache], scales, scales), device)
    slots = torch.arange(4 * size, device=device)
    kv_write(
        draw(4 * size, shape.n_kv_heads), draw(4 * size, shape.n_kv_heads), k_cache, v_cache, slots, *batch.scales(0)
    )
    q = draw(host.num_tokens, shape.n_heads)
    k, v = draw(host.num_tokens, shape.n_kv_heads), draw(host.num_tokens, shape.n_kv_heads)
    write_slots(batch, 0, k, v)
    out = backend.plan(batch).run(shape, q)
    right = paged_attention(
        q.float(), k_cache, v_cache, batch.tables(0), host.query_start.tolist(), host.context_lens.tolist(),
        shape.scale, shape.softcap, shape.window, *batch.scales(0),
    )  # fmt: skip
    return float((out.float() - right).abs().max())


def _batch(size: int, queries: tuple[int, int]) -> ForwardBatch:
    contexts, num_tokens = [size + 3, size - 2], sum(queries)
    tables = np.array([[2, 0], [3, 0]], np.int32)
    tables[0, 1] = 1
    positions = np.concatenate([np.arange(c - n, c) for c, n in zip(contexts, queries, strict=True)])
    owner = np.repeat(np.arange(2), queries)
    return ForwardBatch(
        token_ids=np.zeros(num_tokens, np.int64),
        positions=positions,
        slot_mapping=tables[owner, positions // size].astype(np.int64) * size + positions % size,
        block_tables=tables,
        query_start=np.array([0, queries[0], num_tokens], np.int32),
        context_lens=np.array(contexts, np.int32),
        logit_index=np.arange(num_tokens),
        sample_rows=np.zeros(0, np.int64),
        sample_positions=np.zeros(0, np.int64),
        max_query_len=max(queries),
        max_context_len=max(contexts),
    )
