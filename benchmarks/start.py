"""From the start of a process to an engine that is ready, beside llama.cpp's server, with the file in the page cache.

    python -m benchmarks.start MODEL.gguf --llama-server PATH [--rounds 7] [--json FILE]

Ours is the engine alone, without Ray and HTTP: its process (the interpreter and torch come first), and the part of it
from the opening of the file on. llama-server counts as ready when /health says so. Both take turns; the ratios are
medians of pairs with their bootstrap 95 % interval.
"""

import argparse
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.cpu_speed.cells import Cell
from benchmarks.cpu_speed.engines import sirocco
from benchmarks.cpu_speed.intervals import paired_ratio, spread
from serve_app.cpu_info import num_cores

_LIMIT_S = 120.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Start:
    """One round, in seconds; peak_rss_mb is ours."""

    process_s: float
    load_s: float
    peak_rss_mb: float
    llama_s: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-server", type=Path, required=True, metavar="PATH")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    starts = [_measure(args.model, args.llama_server, args.threads, number) for number in range(-1, args.rounds)][1:]
    print(table(starts))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(start) for start in starts], indent=1))


def table(starts: Sequence[Start]) -> str:
    """Markdown: medians with their ranges, and the ratios."""
    theirs = [start.llama_s for start in starts]
    lines = ["| | s: median (range) | to llama-server |", "|---|---|---|"]
    for label, ours in (
        ("process to ready", [start.process_s for start in starts]),
        ("of which the model", [start.load_s for start in starts]),
    ):
        time_s, ratio = spread(ours), paired_ratio(ours, theirs)
        row = f"{time_s.median:.2f} ({time_s.low:.2f}–{time_s.high:.2f})"
        lines.append(f"| {label} | {row} | {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] |")
    time_s = spread(theirs)
    lines.append(f"| llama-server | {time_s.median:.2f} ({time_s.low:.2f}–{time_s.high:.2f}) | |")
    return "\n".join([*lines, "", f"peak memory {max(start.peak_rss_mb for start in starts):.0f} MB"])


def _measure(model: Path, llama_server: Path, threads: int, number: int) -> Start:
    """Who begins changes from round to round."""
    llama_s = 0.0 if number % 2 else llama_start_s(llama_server, model, threads)
    engine = sirocco(model, [Cell("decode", 0, 16)], threads, "auto")
    engine.start()
    engine.stop()
    facts = engine.facts
    return Start(
        facts["start_s"],
        facts["load_s"],
        facts["peak_rss_mb"],
        llama_s or llama_start_s(llama_server, model, threads),
    )


def llama_start_s(llama_server: Path, model: Path, threads: int) -> float:
    """Seconds until /health answers 200; the server is ended again. TimeoutError after two minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.perf_counter()
    command = [str(llama_server), "-m", str(model), "-t", str(threads), "-c", "4096", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _is_healthy(port):
            if process.poll() is not None:
                raise RuntimeError(f"{llama_server} ended with {process.returncode}")
            if time.perf_counter() - start > _LIMIT_S:
                raise TimeoutError(f"{llama_server} was not ready after {_LIMIT_S:.0f} s")
            time.sleep(_POLL_S)
        return time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
