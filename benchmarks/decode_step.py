"""Microseconds of an engine's decode step: in all, within the native forward, and outside of it.

    python -m benchmarks.decode_step [MODEL.gguf] [--threads 1] [--batches 1,8,32] [--steps 400]

Without a model: 16 layers of random weights, small enough that what is around the forward shows. Outside of the forward
are scheduling, batch building, the draw, detokenising and stop checks. Prints a Markdown table with medians and 10th
percentiles.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.random_models.gguf_writer import write_gguf
from benchmarks.random_models.shapes import SHAPES
from benchmarks.random_models.vocabulary import make_vocabulary
from kernels import dispatch
from serve_app.engine.build import build_engine
from serve_app.engine.engine import Engine
from serve_app.messages import GenerateRequest
from serve_app.options import EngineConfig, ModelSource, SamplingParams

_N_LAYERS = 16
_WARM_UP_STEPS = 20


class Timed:
    """A function, and the seconds of its last call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        """Calls it."""
        start = time.perf_counter()
        result = self._function(*args)
        self.seconds = time.perf_counter() - start
        return result


def measure(engine: Engine, forward: Timed, batch: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds of `steps` decode steps, and of the forward within each."""
    params = SamplingParams(temperature=0.0, max_tokens=steps + _WARM_UP_STEPS, ignore_eos=True)
    for i in range(batch):
        engine.add(GenerateRequest(f"{batch}-{i}", [1 + i, 2, 3], params))
    for _ in range(_WARM_UP_STEPS):
        engine.step()
    whole, inner = np.empty(steps), np.empty(steps)
    for i in range(steps):
        start = time.perf_counter()
        engine.step()
        whole[i], inner[i] = time.perf_counter() - start, forward.seconds
    while engine.has_requests:
        engine.step()
    return whole * 1e6, inner * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            model = Path(folder) / "small.gguf"
            shape = replace(SHAPES["tiny"], n_layers=_N_LAYERS)
            write_gguf(model, shape, make_vocabulary(shape.vocab_size), "bf16", 0)
        length = options.steps + _WARM_UP_STEPS + 32
        largest = max(options.batches)
        config = EngineConfig(max_seqs=largest, num_threads=options.threads, pool_tokens=largest * length)
        engine = build_engine(ModelSource(model=str(model), max_seq_len=length), config, lambda deltas: None)
    runner: Any = engine.parts.runner
    runner._forward = forward = Timed(runner._forward)
    print(f"{dispatch.native().reason}, {options.threads} threads\n")
    print("| batch | step µs, median (p10) | forward | outside of it |\n|---|---|---|---|")
    for batch in options.batches:
        whole, inner = measure(engine, forward, batch, options.steps)
        cells = [f"{np.median(v):.0f} ({np.quantile(v, 0.1):.0f})" for v in (whole, inner, whole - inner)]
        print(f"| {batch} | {' | '.join(cells)} |")
    engine.stop()


if __name__ == "__main__":
    main()
