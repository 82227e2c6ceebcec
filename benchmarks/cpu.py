"""Sirocco against other engines on this CPU, in turn, in one run; and how near it comes to what the machine can do.

    python -m benchmarks.models llama-1b FOLDER --quantize PATH/llama-quantize        # the files, once
    python -m benchmarks.cpu FOLDER --llama-bench PATH/llama-bench [--mistralrs PYTHON] [--openvino PYTHON] \\
        [--transformers PYTHON] [--models llama-1b,qwen-0.5b] [--types Q4_K_M,Q8_0] [--quick] [--json FILE]

Each engine loads its model once for a type and then waits on its standard input while others are measured; the
programs of llama.cpp run anew each time. Cells: the prefill of prompts, the decode of single streams behind prompts of
some depth, and of batches. For each: tokens a second, median and range over the rounds; the ratio to the better of
llama.cpp and mistral.rs, pair by pair, with its 95 % interval; processor time a token; and in decode the share of the
read bandwidth, which is measured in every round, and for Sirocco also between any two steps of rounds of their own: on
a machine that changes by the second the latter is to be believed. For ratios near 1 ask for 15 rounds or more.
SIROCCO_CPU_ISA in the environment forces our instruction set, to be compared with a llama.cpp built for the same.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

from benchmarks.cpu_speed.cells import make_cells
from benchmarks.cpu_speed.engines import Peers, make_engines
from benchmarks.cpu_speed.machine import probe, read_bandwidth
from benchmarks.cpu_speed.model_facts import KV_BYTES, ModelFacts
from benchmarks.cpu_speed.plan import run_rounds
from benchmarks.cpu_speed.report import machine_json, markdown, run_json
from benchmarks.models import gguf_path
from serve_app.cpu_info import num_cores

# Half a second: a virtual machine's bandwidth may change twofold from one second to the next.
BANDWIDTH_PASSES = 16


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.prefills, args.depths, args.batches, args.new = 2, [128], [0], [8], 16
    cells = make_cells(args.prefills, args.depths, args.batches, args.new)
    if not cells or args.rounds < 1:
        parser.error("nothing to measure")
    paths = [gguf_path(args.folder, model, quant_type) for model in args.models for quant_type in args.types]
    for path in paths:
        if not path.exists():
            parser.error(f"{path} is not there; benchmarks.models makes it")
    peers = Peers(args.llama_bench, args.mistralrs, args.openvino, args.transformers, args.sirocco)
    machine = probe(args.threads)
    report: dict[str, Any] = {"machine": machine_json(machine), "runs": []}
    for model in args.models:
        for quant_type in args.types:
            print(f"# {model} {quant_type}", flush=True)
            engines = make_engines(peers, args.folder, model, quant_type, cells, args.threads, args.kv)
            try:
                results = run_rounds(
                    engines,
                    cells,
                    args.rounds,
                    lambda: harmonic_mean(read_bandwidth(args.threads, BANDWIDTH_PASSES)),
                    lambda text: print(text, flush=True),
                )
            finally:
                for engine in engines:
                    engine.stop()
            facts = ModelFacts.of(gguf_path(args.folder, model, quant_type))
            run = run_json(model, quant_type, args.kv, engines, cells, results, facts, machine)
            report["runs"].append(run)
            # After each type: a long run that is ended early keeps what it has.
            if args.json is not None:
                args.json.write_text(json.dumps(report, indent=1))
            if args.markdown is not None:
                args.markdown.write_text(markdown(report))
    print(markdown(report))


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with files named as benchmarks.models names them")
    parser.add_argument("--models", type=_words, default=["llama-1b"])
    parser.add_argument("--types", type=_words, default=["Q4_K_M", "Q8_0", "Q6_K", "Q4_0", "BF16"])
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama-batched-bench is looked for beside it")
    parser.add_argument("--mistralrs", type=Path, metavar="PYTHON", help="of an environment with mistralrs")
    parser.add_argument("--openvino", type=Path, metavar="PYTHON", help="of one with openvino-genai; needs its exports")
    parser.add_argument("--transformers", type=Path, metavar="PYTHON", help="of one with transformers; type BF16 only")
    parser.add_argument("--sirocco", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefills", type=_numbers, default=[128, 512, 2048])
    parser.add_argument("--depths", type=_numbers, default=[0, 1024, 4096])
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 8, 16])
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds of one prefill, one decode and one batch, 16 tokens"
    )
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument(
        "--kv", choices=sorted(KV_BYTES), default="f16", help="the cache's type in every engine that has it"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser


if __name__ == "__main__":
    # Ended from outside, it still ends what it has started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
