"""mistral.rs by its Python package; runs in that package's environment. See child_loop.

Version 0.9.5 fails on batches of prompts of equal length, and its completion requests cannot be sent from several
threads: streams are chat requests with prompts of unequal length.
"""

import os
from collections.abc import Iterator
from importlib.metadata import version
from threading import Thread
from time import perf_counter
from typing import Any

from child_loop import Cell, Figures, Measure, cpu_s, letters, serve
from mistralrs import ChatCompletionRequest, CompletionRequest, Runner, Which

NUM_PREFIXES = 4  # so many prompts keep their cache: those of the depths are computed once
GREEDY = {"model": "default", "temperature": 0.0, "ignore_eos": True}


class Stream(Thread):
    """Reads one answer to its end, with the moment and the process's processor time of each token."""

    def __init__(self, chunks: Iterator[Any]) -> None:
        super().__init__()
        self._chunks = chunks
        self.marks: list[tuple[float, float]] = []

    def run(self) -> None:
        """See Thread."""
        for _ in self._chunks:
            self.marks.append((perf_counter(), cpu_s()))


class MistralRs:
    """One runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def measure(self, cell: Cell) -> Figures:
        """See child_loop."""
        return self._prefill(cell) if cell["kind"] == "prefill" else self._streams(cell)

    def _prefill(self, cell: Cell) -> Figures:
        request = CompletionRequest(prompt=letters(cell["prompt"], cell["seed"]), max_tokens=1, **GREEDY)
        before = cpu_s()
        usage = self._runner.send_completion_request(request).usage
        return {
            "tokens": usage.prompt_tokens,
            "seconds": usage.total_prompt_time_sec,
            "cpu_s": cpu_s() - before,
        }

    def _streams(self, cell: Cell) -> Figures:
        """The time in which all streams give tokens, from the last one's first to the first one's last.

        Where they do not overlap for half of the tokens, all of it counts, from the first token to the last.
        """
        streams = []
        for i in range(cell["streams"]):
            # In a batch the seed varies the texts, at a depth the text stays: a prefix cache may keep it.
            seed = cell["seed"] + i if cell["kind"] == "batch" else 0
            text = letters(max(1, cell["prompt"]) + i, seed)
            request = ChatCompletionRequest(
                messages=[{"role": "user", "content": text}], max_tokens=cell["new"] + 1, stream=True, **GREEDY
            )
            streams.append(Stream(self._runner.send_chat_completion_request(request)))
        for stream in streams:
            stream.start()
        for stream in streams:
            stream.join()
        firsts, lasts = ([stream.marks[i] for stream in streams] for i in (0, -1))
        start, end = max(firsts), min(lasts)
        times = [mark[0] for stream in streams for mark in stream.marks]
        tokens = sum(start[0] < t <= end[0] for t in times)
        if 2 * tokens < len(times):
            start, end = min(firsts), max(lasts)
            tokens = len(times) - 1
        return {"tokens": tokens, "seconds": end[0] - start[0], "cpu_s": end[1] - start[1]}


def load(options: dict[str, Any]) -> tuple[Measure, dict[str, Any]]:
    """options: folder, file, threads, streams, kv. Its cache on a CPU is f16, or f32 by the environment."""
    os.environ["RAYON_NUM_THREADS"] = str(options["threads"])
    if options["kv"] == "f32":
        os.environ["MISTRALRS_CPU_KV_F32"] = "1"
    which = Which.GGUF(quantized_model_id=options["folder"], quantized_filename=options["file"])
    runner = Runner(which=which, max_seqs=options["streams"], prefix_cache_n=NUM_PREFIXES)
    facts = {"version": version("mistralrs"), "kv": "f32" if options["kv"] == "f32" else "f16"}
    return MistralRs(runner).measure, facts


if __name__ == "__main__":
    serve(load)
