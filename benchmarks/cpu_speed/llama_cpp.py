"""llama.cpp by its own programs: llama-bench for prompts and single streams, llama-batched-bench for batches.

Each measurement is a process of its own, since these programs cannot wait for the next; their figures leave out the
loading.
"""

import json
import os
import re
import subprocess
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from benchmarks.cpu_speed.cells import Cell, Sample
from benchmarks.cpu_speed.engine import EngineError

_UBATCH_TOKENS = 512
_CONTEXT_UNIT = 256  # a stream's context is made of such units
_START = re.compile(r"(prompt|generation) run 1/1")


class LlamaCpp:
    """See Engine. kv: the cache's type by llama.cpp's name."""

    def __init__(self, llama_bench: Path, model: Path, threads: int, kv: str) -> None:
        self.name = "llama.cpp"
        self.needed_bytes = 0
        self.is_loaded = False
        self.facts: dict[str, Any] = {"kv": kv, "file": model.name}
        self._bench = llama_bench
        self._batched_bench = llama_bench.with_name("llama-batched-bench")
        self._common = ["-m", str(model), "-t", str(threads), "-ctk", kv, "-ctv", kv]

    def can(self, cell: Cell) -> bool:
        """See Engine."""
        if cell.kind == "batch":
            return self._batched_bench.exists()
        return cell.kind in ("prefill", "decode")

    def measure(self, cell: Cell, seed: int) -> Sample:
        """See Engine. llama-bench makes its own random prompts."""
        if cell.kind == "batch":
            lines, _ = _run([str(self._batched_bench), *self._common, *batched_bench_arguments(cell)])
            return parse_batched_bench(lines, cell)
        lines, cpu_s = _run([str(self._bench), *self._common, *bench_arguments(cell)])
        sample, facts = parse_bench(lines, cpu_s)
        self.facts.update(facts)
        return sample

    def stop(self) -> None:
        """See Engine."""


def bench_arguments(cell: Cell) -> list[str]:
    """llama-bench's options for one repetition of a prefill or decode."""
    prompt, new, depth = (cell.prompt, 0, 0) if cell.kind == "prefill" else (0, cell.new, cell.prompt)
    sizes = ["-p", str(prompt), "-n", str(new), "-d", str(depth), "-ub", str(_UBATCH_TOKENS)]
    return [*sizes, "-r", "1", "-o", "jsonl", "--progress"]


def batched_bench_arguments(cell: Cell) -> list[str]:
    """llama-batched-bench's options for a batch.

    A second, short test comes behind it: the program may end before it has written its last line.
    """
    context = cell.streams * (-(-(cell.prompt + cell.new) // _CONTEXT_UNIT) * _CONTEXT_UNIT)
    sizes = ["-c", str(context), "-b", "2048", "-ub", str(_UBATCH_TOKENS)]
    shape = ["-npp", str(cell.prompt), "-ntg", f"{cell.new},1", "-npl", str(cell.streams)]
    return [*sizes, *shape, "--output-format", "jsonl"]


def parse_bench(lines: Sequence[str], cpu_s: float | None) -> tuple[Sample, dict[str, Any]]:
    """llama-bench's one JSON line: the sample, and facts of the build."""
    result = _first_json(lines, "avg_ns")
    tokens = result["n_prompt"] + result["n_gen"]
    seconds = sum(result["samples_ns"]) / len(result["samples_ns"]) / 1e9
    version = f"{result['build_commit']} ({result['build_number']})"
    return Sample(tokens, seconds, cpu_s), {"version": version, "type": result["model_type"]}


def parse_batched_bench(lines: Sequence[str], cell: Cell) -> Sample:
    """llama-batched-bench's first JSON line: the part that generates."""
    result = _first_json(lines, "t_tg")
    assert result["tg"] == cell.new, result
    return Sample(cell.streams * cell.new, result["t_tg"], None)


def _first_json(lines: Sequence[str], key: str) -> dict[str, Any]:
    for line in lines:
        if line.startswith("{"):
            value: dict[str, Any] = json.loads(line)
            if key in value:
                return value
    raise EngineError(f"llama.cpp: no JSON line with {key!r} in: {' '.join(lines)[-400:]}")


def _run(command: list[str]) -> tuple[list[str], float | None]:
    """Output lines, and the processor seconds between the note that a run starts and the first line of output.

    llama-bench notes "… run 1/1" on standard error when it starts the clock, and writes the result when the run has
    ended.
    """
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise EngineError(f"{command[0]} cannot be run ({error.strerror})") from error
    assert process.stdout is not None
    notes = _Notes(process)
    notes.start()
    try:
        with process.stdout:
            lines = [process.stdout.readline()]
            after = cpu_s_of(process.pid)
            lines += process.stdout
        process.wait()
    finally:
        process.kill()  # where we are interrupted
        notes.join()
    if process.returncode:
        raise EngineError(f"{command[0]} ended with {process.returncode}: {notes.last_words()}")
    return lines, None if notes.before is None or after is None else after - notes.before


class _Notes(Thread):
    """Reads a process's standard error to its end."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        super().__init__()
        self.before: float | None = None
        self._process = process
        self._lines: deque[str] = deque(maxlen=10)

    def run(self) -> None:
        """See Thread."""
        assert self._process.stderr is not None
        with self._process.stderr as notes:
            for line in notes:
                self._lines.append(line)
                if _START.search(line):
                    self.before = cpu_s_of(self._process.pid)

    def last_words(self) -> str:
        """The last lines."""
        return "".join(self._lines)[-800:].strip()


def cpu_s_of(pid: int, root: Path = Path("/proc")) -> float | None:
    """Processor seconds of a process so far, ended threads included; None when it is gone."""
    try:
        fields = (root / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
