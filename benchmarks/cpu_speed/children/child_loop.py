"""The loop of an engine's own process: options in, facts out, then cells in, figures out, a JSON line each.

Needs nothing but the standard library: the scripts beside it run in other environments.
"""

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

Cell = dict[str, Any]
Figures = dict[str, Any]
Measure = Callable[[Cell], Figures]


def serve(load: Callable[[dict[str, Any]], tuple[Measure, dict[str, Any]]]) -> None:
    """load(options) → (measure, facts), to which the time of loading and the memory used so far are added.

    What libraries print goes to standard error. An error in a cell is a reply.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    options = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    measure, facts = load(options)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reply({**facts, "load_s": round(time.perf_counter() - start, 2), "peak_rss_mb": round(peak_kib * 1024 / 1e6)})
    for line in sys.stdin:
        try:
            reply(measure(json.loads(line)))
        except Exception as error:  # whatever the engine raises: the next cell may work
            reply({"error": f"{type(error).__name__}: {error}"})
    # Engines with threads of their own may hang in their destructors.
    os._exit(0)


def cpu_s() -> float:
    """Processor seconds of this process so far, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Clock:
    """Marks points in time; the figures are those between the first and the last mark."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """Now."""
        self._marks.append((time.perf_counter(), cpu_s()))

    def figures(self, tokens: int) -> Figures:
        """What a reply has, for tokens that came between the marks."""
        (start, start_cpu), (end, end_cpu) = self._marks[0], self._marks[-1]
        return {"tokens": tokens, "seconds": end - start, "cpu_s": end_cpu - start_cpu}


def letters(count: int, seed: int) -> str:
    """A text of `count` words of one letter, each one token in byte-level BPE vocabularies of any size."""
    rng = random.Random(seed)
    return "".join(f" {rng.choice('abcdefghijklmnopqrstuvwxyz')}" for _ in range(count))


def token_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(count)]
