"""Decode attention of one layer: contexts of several lengths by batches of several sizes, by every backend here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.sizes import Sizes
from kernels.gpu.timing import Timer
from serve_app.attention.backend import AttentionNeeds, AttentionShape
from serve_app.attention.choose import architecture_of, choose_backend, list_backends
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.self_test import SmallCache
from serve_app.batch import ForwardBatch
from serve_app.errors import LaunchError

CONTEXTS = (1024, 8192, 32768)
BATCHES = (1, 16, 64, 256)
BLOCK = 32
MEMORY_SHARE = 0.6
"""Of the free memory that a cache may take; larger cells are left out."""


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """seconds of one layer's attention; kv_bytes: keys and values that it reads."""

    backend: str
    context: int
    batch: int
    seconds: float
    kv_bytes: int

    @property
    def bytes_per_s(self) -> float:
        """Of keys and values."""
        return self.kv_bytes / self.seconds


def measure(
    sizes: Sizes,
    device: torch.device,
    has_time: Callable[[], bool],
    contexts: tuple[int, ...] = CONTEXTS,
    batches: tuple[int, ...] = BATCHES,
) -> Iterator[AttentionRow]:
    """All cells that fit the memory, until the time is up."""
    dtype = torch.bfloat16
    shape = AttentionShape(0, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.head_dim**-0.5)
    needs = AttentionNeeds(device, architecture_of(device), dtype, dtype, BLOCK, (shape,))
    timer = Timer(device)
    names = [report.name for report in list_backends(needs) if report.is_usable]
    for context in contexts:
        for batch in batches:
            token_bytes = 2 * sizes.kv_heads * sizes.head_dim * dtype.itemsize
            kv_bytes = batch * context * token_bytes
            if device.type == "cuda" and kv_bytes > MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
                print(
                    f"attention, {batch} x {context}: {kv_bytes / 1e9:.0f} GB of keys and values do not fit", flush=True
                )
                continue
            step = _step(sizes, context, batch, device, dtype)
            q = torch.randn(batch, sizes.heads, sizes.head_dim, device=device).to(dtype)
            for name in names:
                if not has_time():
                    return
                try:
                    backend = choose_backend(needs, name)
                except LaunchError as error:
                    print(f"{name}: {error}", flush=True)
                    continue
                if backend is None or (name == "torch" and kv_bytes > 4 << 30):
                    continue  # plain torch gathers a copy of the context
                planned = backend.plan(step)
                seconds = timer(lambda planned=planned, q=q: planned.run(shape, q))
                yield AttentionRow(name, context, batch, seconds, kv_bytes)
            del step


def _step(sizes: Sizes, context: int, batch: int, device: torch.device, dtype: torch.dtype) -> DeviceBatch:
    """A decode of every request behind its context; each has blocks of its own, in random order."""
    per_request = -(-context // BLOCK)
    num_blocks = batch * per_request
    order = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    tables = order.reshape(batch, per_request)
    cache = [
        torch.empty(num_blocks, BLOCK, sizes.kv_heads, sizes.head_dim, dtype=dtype, device=device).normal_()
        for _ in "kv"
    ]
    last = context - 1
    slots = tables[:, last // BLOCK].astype(np.int64) * BLOCK + last % BLOCK
    host = ForwardBatch(
        token_ids=np.zeros(batch, np.int64),
        positions=np.full(batch, last, np.int64),
        slot_mapping=slots,
        block_tables=tables,
        query_start=np.arange(batch + 1, dtype=np.int32),
        context_lens=np.full(batch, context, np.int32),
        logit_index=np.arange(batch),
        sample_rows=np.arange(batch),
        sample_positions=np.full(batch, context, np.int64),
        max_query_len=1,
        max_context_len=context,
    )
    return DeviceBatch.of(host, SmallCache([cache[0]], [cache[1]], None, None), device)
