"""How long a call takes on a device, with its operands out of the cache."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# More than any GPU's second-level cache. Clearing it also gives the host time to send the call before it is timed.
FLUSH_BYTES = 256 << 20


class Timer:
    """Median seconds of a call between two events of the device; of a single one on the CPU, to try the code out."""

    def __init__(self, device: torch.device, repeats: int = 20) -> None:
        self._is_cuda = device.type == "cuda"
        self._repeats = repeats
        self._flush = torch.empty(FLUSH_BYTES if self._is_cuda else 0, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        """The first call is not counted: it compiles."""
        call()
        if not self._is_cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        times = []
        for _ in range(self._repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return float(statistics.median(times))
