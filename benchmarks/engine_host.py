"""Host cost of an engine step with a null forward: scheduling, batch building, detokenising, stop checks, ledger and
pump message. Prints microseconds per step and per request.

    python -m benchmarks.engine_host [--batch 1,32,256] [--steps 400] [--profile]
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from pathlib import Path

from benchmarks.null_engine import null_engine
from deployments.token_pump import pack_tokens
from serve_app.engine.engine import Engine
from serve_app.messages import GenerateRequest
from serve_app.options import EngineConfig, SamplingParams

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "models" / "stories260K" / "hf"
PROMPT_TOKENS = 64


def make_engine(batch: int, steps: int) -> Engine:
    """An engine in the middle of decoding `batch` requests, each with a stop string."""
    length = PROMPT_TOKENS + steps + 64
    config = EngineConfig(max_seqs=batch, max_batched_tokens=max(2048, batch), max_waiting=batch)
    engine = null_engine(TOKENIZER, config, length + 32, batch * (length // 32 + 2))
    params = SamplingParams(seed=1, ignore_eos=True, stop=("never in the text",))
    for i in range(batch):
        engine.add(GenerateRequest(f"request-{i:08d}", [1, *range(260, 260 + PROMPT_TOKENS - 1)], params))
    while engine.stats().num_running < batch or any(r.num_pending != 1 for r in engine.parts.scheduler.running):
        engine.step()
    return engine


def measure(batch: int, steps: int) -> list[float]:
    """Seconds of each step: engine step and pump message."""
    engine = make_engine(batch, steps)
    times = []
    for sequence in range(steps):
        start = time.perf_counter()
        pack_tokens(1, sequence, engine.step())
        times.append(time.perf_counter() - start)
    engine.abort_all()
    engine.stop()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", default="1,32,256")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    sys.setswitchinterval(0.0005)
    print(f"{'batch':>6} {'median µs/step':>15} {'p95 µs/step':>12} {'µs/request':>11}")
    for batch in map(int, args.batch.split(",")):
        measure(batch, 50)
        if args.profile:
            with cProfile.Profile() as profile:
                times = measure(batch, args.steps)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        else:
            times = measure(batch, args.steps)
        median = statistics.median(times) * 1e6
        p95 = statistics.quantiles(times, n=20)[18] * 1e6
        print(f"{batch:>6} {median:>15.0f} {p95:>12.0f} {median / batch:>11.2f}")


if __name__ == "__main__":
    main()
