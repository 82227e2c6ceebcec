"""Decode steps as CUDA graphs: a step of a few hundred kernels is one launch, and the host is not in the way.

A graph has fixed shapes, so there is one for each bucket of requests and of context lengths; a step is filled up to
its bucket with requests that have no context and no slot. Steps with prefills run one operation after the other.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from serve_app.attention.array_pack import ArrayPack
from serve_app.attention.device_batch import Cache, DeviceBatch, step_arrays
from serve_app.batch import ForwardBatch, GroupTables

log = logging.getLogger(__name__)

NO_GRAPHS = "CUDA graphs are not used: steps run kernel by kernel, which is slower"

SHORTEST_CONTEXT = 2048
"""Tokens of the first bucket of contexts; each further one is four times as long."""


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """The largest step that the engine can have: requests, and tokens of a context."""

    max_seqs: int
    max_context: int


class PagedCache(Cache, Protocol):
    """A cache that knows its block size."""

    @property
    def block_size(self) -> int: ...


class Recorder(Protocol):
    """Makes something that can be replayed of a function whose inputs and results stay where they are."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What computes run() again, on what its inputs hold then."""
        ...


class CudaRecorder:
    """See Recorder: CUDA graphs that share one pool of memory, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See Recorder."""
        # Once outside of a graph: kernels are compiled and libraries take their memory at the first call.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: graphs of other weights are recorded beside a running engine.
        place = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with place:
            run()
        return graph.replay


class _Graph:
    """One bucket: its inputs in one buffer on the device, and what replays it."""

    def __init__(
        self,
        host: ForwardBatch,
        cache: Cache,
        logits: Tensor,
        run: Callable[[DeviceBatch], Tensor],
        recorder: Recorder,
    ) -> None:
        """host: a step of idle requests alone, of the bucket's size; logits [requests, vocabulary]: where they go."""
        arrays = step_arrays(host)
        self._logits = logits
        self._pack = ArrayPack(arrays)
        self._idle = torch.empty(self._pack.num_bytes, dtype=torch.uint8)
        for view, array in zip(self._pack.arrays(self._idle), arrays, strict=True):
            view[...] = array
        self._inputs = self._idle.to(logits.device, copy=True)
        batch = DeviceBatch.over(self._pack.tensors(self._inputs), host, cache)

        def write_logits() -> None:
            logits.copy_(run(batch))

        self._replay = recorder.record(write_logits)

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """The logits of a decode step that fits the bucket."""
        count, width = batch.block_tables.shape
        buffer = self._pack.host_buffer(self._inputs.device)
        buffer.copy_(self._idle)
        token_ids, positions, _, context_lens, _, *of_groups = self._pack.arrays(buffer)
        token_ids[:count] = batch.token_ids
        positions[:count] = batch.positions
        context_lens[:count] = batch.context_lens
        for i, group in enumerate(batch.groups):
            of_groups[2 * i][:count] = group.slot_mapping
            of_groups[2 * i + 1][:count, :width] = group.block_tables
        self._inputs.copy_(buffer, non_blocking=True)
        self._replay()
        return self._logits[:count]


class GraphForward:
    """See Forward: graphs for steps of decodes alone, run_eagerly for all others."""

    def __init__(
        self,
        run: Callable[[DeviceBatch], Tensor],
        run_eagerly: Callable[[ForwardBatch], Tensor],
        cache: PagedCache,
        vocab_size: int,
        limits: GraphLimits,
        recorder: Recorder,
    ) -> None:
        """run: the forward over a step on the device, to be recorded. Records the shortest contexts' graphs now."""
        self._run = run
        self._run_eagerly = run_eagerly
        self._cache = cache
        self._recorder = recorder
        self._counts = request_buckets(limits.max_seqs)
        self._widths = table_widths(limits.max_context, cache.block_size)
        # One for all graphs, of which one runs at a time: else each would keep its own.
        self._logits = torch.empty(limits.max_seqs, vocab_size, device=cache.k[0].device)
        # None: could not be recorded.
        self._graphs: dict[tuple[int, int], _Graph | None] = {}
        self._begin()

    @property
    def num_graphs(self) -> int:
        """Graphs recorded so far."""
        return sum(graph is not None for graph in self._graphs.values())

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """See Forward."""
        key = self._bucket(batch)
        graph = None if key is None else self._graph(*key)
        return self._run_eagerly(batch) if graph is None else graph(batch)

    def _begin(self) -> None:
        most, longest, shortest = self._counts[-1], self._widths[-1], self._widths[0]
        # The longest first: it makes the rotary table as long as it will ever be, and graphs keep its address.
        for count, width in dict.fromkeys([(most, longest), *((count, shortest) for count in self._counts[::-1])]):
            if self._graph(count, width) is None:
                # What cannot be recorded once cannot be recorded at all.
                self._counts = []
                log.warning(NO_GRAPHS)
                return

    def _bucket(self, batch: ForwardBatch) -> tuple[int, int] | None:
        """The smallest bucket that a step fits; None for a step that is no decode alone, or larger than all."""
        count, width = batch.block_tables.shape
        if not count == batch.num_tokens == len(batch.logit_index) or batch.max_query_len != 1:
            return None
        most = next((bucket for bucket in self._counts if bucket >= count), None)
        widest = next((bucket for bucket in self._widths if bucket >= width), None)
        return None if most is None or widest is None else (most, widest)

    def _graph(self, count: int, width: int) -> _Graph | None:
        key = (count, width)
        if key not in self._graphs:
            self._graphs[key] = self._record(count, width)
        return self._graphs[key]

    def _record(self, count: int, width: int) -> _Graph | None:
        tokens = width * self._cache.block_size
        start, free = time.monotonic(), self._free_bytes()
        host = _idle_step(count, width, self._cache.block_size, len(set(self._cache.groups)))
        try:
            graph = _Graph(host, self._cache, self._logits[:count], self._run, self._recorder)
        except Exception as error:  # an operation that cannot be captured, or no memory left: others may do
            reason = (str(error).splitlines() or [""])[0]
            log.warning(
                "no CUDA graph for %d requests of %d tokens (%s: %s)", count, tokens, type(error).__name__, reason
            )
            return None
        log.info(
            "CUDA graph for %d requests of up to %d tokens: recorded in %.2f s, %.1f MB",
            count, tokens, time.monotonic() - start, (free - self._free_bytes()) / 1e6,
        )  # fmt: skip
        return graph

    def _free_bytes(self) -> int:
        device = self._logits.device
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def request_buckets(most: int) -> list[int]:
    """Numbers of requests: 1, 2, 4, then in steps of 8 up to 64, of 32 beyond; the last is `most` itself."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, most, 32)]
    return [*(count for count in steps if count < most), most]


def table_widths(max_context: int, block_size: int) -> list[int]:
    """Blocks of a context in each bucket; the last one holds max_context."""
    longest = -(-max_context // block_size)
    widths, width = [], -(-SHORTEST_CONTEXT // block_size)
    while width < longest:
        widths.append(width)
        width *= 4
    return [*widths, longest]


def _idle_step(count: int, width: int, block_size: int, num_groups: int) -> ForwardBatch:
    """A decode of requests that have no context: what they compute is nowhere kept, and no slot is written."""
    groups = [GroupTables(np.full(count, -1, np.int64), np.zeros((count, width), np.int32)) for _ in range(num_groups)]
    return ForwardBatch(
        token_ids=np.zeros(count, np.int64),
        positions=np.zeros(count, np.int64),
        slot_mapping=groups[0].slot_mapping,
        block_tables=groups[0].block_tables,
        query_start=np.arange(count + 1, dtype=np.int32),
        context_lens=np.zeros(count, np.int32),
        logit_index=np.arange(count),
        sample_rows=np.zeros(0, np.int64),
        sample_positions=np.zeros(0, np.int64),
        max_query_len=1,
        max_context_len=width * block_size,
        further_groups=tuple(groups[1:]),
    )
