"""What HTTP costs on a model of true size: tokens/s through the server against the engine alone, while both are up.

    python -m benchmarks.http_cpu MODEL.gguf [--streams 1,16] [--tokens 64] [--pairs 15] [--json FILE] [-- OPTIONS]

The server is started as its users start it, the engine alone is a process of its own that waits on its standard input
while the server is measured; so the idle application is up all the time. Each pair measures both with the same prompts
of random tokens, in changing order. Prints the median of the pairs' ratios with its bootstrap 95 % interval, and the
processor time a token of both: all processes of the server count, in both, since it is up in both. The client runs on
the same cores and is counted nowhere.
"""

import argparse
import json
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cpu_speed.cells import Cell, Sample
from benchmarks.cpu_speed.child_engine import ChildEngine
from benchmarks.cpu_speed.children.child_loop import token_ids
from benchmarks.cpu_speed.engines import sirocco
from benchmarks.cpu_speed.model_facts import ModelFacts
from benchmarks.cpu_speed.report import ratio_json
from benchmarks.overhead import Server, body
from serve_app.cpu_info import num_cores

PROMPT_TOKENS = 32
_SEEDS_APART = 1000  # more than any number of streams: no prompt is used twice


def main() -> None:
    args = _parser().parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    vocab_size = ModelFacts.of(args.model).vocab_size
    cells = [Cell("serve", PROMPT_TOKENS, args.tokens, n) for n in args.streams]
    alone = sirocco(args.model, cells, args.threads, "auto")
    pool = ProcessPoolExecutor(1)
    pool.submit(os.getpid).result()
    options = ["--threads", str(args.threads), "--max-seqs", str(max(args.streams))]
    server = Server([*options, *args.server, "run", "-m", str(args.model)])
    print(f"server ready after {server.start_s:.1f} s", flush=True)
    report = []
    try:
        for cell in cells:
            pairs = []
            for number in range(-1, args.pairs):
                pair = _measure_pair(alone, server, pool, cell, number + 1, vocab_size)
                if number >= 0:
                    pairs.append(pair)
                    print(f"{cell.label}: {pair[0].rate:.2f} of {pair[1].rate:.2f} tok/s", flush=True)
            report.append(_summary(cell, pairs))
            if args.json is not None:
                args.json.write_text(json.dumps({"model": args.model.name, "threads": args.threads, "cells": report}))
    finally:
        alone.stop()
        server.stop()
    print(_table(report))


def _measure_pair(
    alone: ChildEngine, server: Server, pool: ProcessPoolExecutor, cell: Cell, number: int, vocab_size: int
) -> tuple[Sample, Sample]:
    """(served, alone); who begins changes from pair to pair."""
    seed = number * _SEEDS_APART
    contents = [body(cell.new, token_ids(cell.prompt, vocab_size, seed + i)) for i in range(cell.streams)]

    def served() -> Sample:
        found = server.measure(pool, contents)
        return Sample(found.tokens, found.seconds, sum(found.cpu_s.values()))

    def by_itself() -> Sample:
        start, idle_cpu_s = time.perf_counter(), server.watch_cpu()
        found = alone.measure(cell, seed)
        # The idle application is up for both; what it takes belongs to both.
        idle = sum(idle_cpu_s().values()) * found.seconds / (time.perf_counter() - start)
        return Sample(found.tokens, found.seconds, (found.cpu_s or 0.0) + idle)

    if number % 2:
        first = served()
        return first, by_itself()
    second = by_itself()
    return served(), second


def _summary(cell: Cell, pairs: list[tuple[Sample, Sample]]) -> dict[str, Any]:
    return {
        "streams": cell.streams,
        "served_tok_per_s": median(s.rate for s, _ in pairs),
        "alone_tok_per_s": median(a.rate for _, a in pairs),
        "served_cpu_ms_per_token": median((s.cpu_s or 0) / s.tokens * 1e3 for s, _ in pairs),
        "alone_cpu_ms_per_token": median((a.cpu_s or 0) / a.tokens * 1e3 for _, a in pairs),
        "ratio": ratio_json(pairs),
    }


def _table(report: list[dict[str, Any]]) -> str:
    lines = ["", "| streams | engine alone, tok/s | over HTTP | ratio | CPU ms/token alone, over HTTP | ratio |"]
    lines.append("|---|---|---|---|---|---|")
    for row in report:
        ratio = row["ratio"]
        cells = [
            str(row["streams"]),
            f"{row['alone_tok_per_s']:.2f}",
            f"{row['served_tok_per_s']:.2f}",
            f"**{ratio['median']:.3f}** [{ratio['low']:.3f}, {ratio['high']:.3f}], {ratio['pairs']} pairs",
            f"{row['alone_cpu_ms_per_token']:.1f}, {row['served_cpu_ms_per_token']:.1f}",
            f"{ratio['cpu_time']['median']:.3f} [{ratio['cpu_time']['low']:.3f}, {ratio['cpu_time']['high']:.3f}]",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--json", type=Path)
    parser.add_argument("server", nargs="*", help="options for the server, behind --")
    return parser


if __name__ == "__main__":
    # Ended from outside, it still ends what it has started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
