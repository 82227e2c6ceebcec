"""What speculative decoding pays: tokens/s with it over tokens/s without, through the actors of one server.

    python -m benchmarks.speculation [--parts payoff,stranger,batch,sweep,messaging] [--isq TYPE] [--folder FOLDER]
        [--tokens 64] [--pairs 15] [--rounds 3] [--json FILE]

The target has TinyLlama-1.1B's sizes and random weights in bfloat16; the draft is its first two layers with its head,
and the target's other layers change so little that the draft is right about 87 times of 100 (random_models/draft_pair).
Both run as a user runs them, each in its replica's process. A request turns speculation off for itself, so that
every ratio is of pairs taken in turn on one server; which of the two begins changes from pair to pair. Beside a ratio
stands that of Leviathan et al. (2023), theorem 3.8, with what was measured: (1 - a^(g+1)) / ((1 - a) (c g + v)), a the
acceptance, g the drafted tokens, c and v the times of the draft's step and of the target's over g + 1 tokens, in steps
of the target alone.

payoff: one stream, the number of drafted tokens as the server chooses it. stranger: the same with a draft that knows
nothing of the target. batch: 32 streams. sweep: one stream, by number of drafted tokens and by acceptance, over
several targets. messaging: what the way to the draft and back costs a step, of a pair so small that its models leave
caches and cores alone (stories3M and stories260K), which ask at every step; with as many threads as otherwise, where
both models need the same cores, and with one, where each may have one of two. The other parts tell it of theirs, too.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.cpu_speed.children.child_loop import token_ids
from benchmarks.cpu_speed.intervals import paired_ratio
from benchmarks.overhead import Server, body, process_kind
from benchmarks.random_models.draft_pair import DraftPair
from benchmarks.random_models.shapes import SHAPES
from serve_app.cpu_info import num_physical_cores

SHAPE = SHAPES["tinyllama-1.1b"]
DRAFT_LAYERS = 2
CHANGE = 0.13
SWEEP_CHANGES = (0.5, 0.3, CHANGE, 0.05)
SWEEP_GAMMAS = (1, 2, 3, 4, 5, 6, 8)
PROMPT_TOKENS = 32
BATCH = 32
MESSAGES = 2000
SMALL = Path(__file__).parents[1] / "tests" / "data" / "models"
MOST = 8


@dataclass(frozen=True, slots=True)
class StepCosts:
    """verify[k]: seconds of the target's step over k + 1 tokens of one request; draft: of the draft's for one."""

    verify: list[float]
    draft: float

    def speedup(self, acceptance: float, gamma: int) -> float:
        """See the module."""
        tokens = sum(acceptance**i for i in range(gamma + 1))
        return tokens * self.verify[0] / (self.draft * gamma + self.verify[gamma])

    def best(self, acceptance: float) -> tuple[float, int]:
        """The highest speed-up, and the number of drafted tokens that gives it."""
        return max((self.speedup(acceptance, gamma), gamma) for gamma in range(MOST + 1))


@dataclass(slots=True)
class Speculated:
    """What a server counted since it started."""

    by_position: list[float]
    proposals: float
    drafted: float

    @staticmethod
    def of(server: Server) -> "Speculated":
        """Now."""
        found = server.metrics()
        name = "sirocco_speculation_"
        positions = [found.get(f'{name}accepted_by_position_total{{position="{i}"}}', 0.0) for i in range(1, MOST + 1)]
        drafted = sum(value for key, value in found.items() if key.startswith(f"{name}drafted_tokens_total"))
        return Speculated(positions, found.get(f"{name}steps_total", 0.0), drafted)

    def __sub__(self, before: "Speculated") -> "Speculated":
        positions = [a - b for a, b in zip(self.by_position, before.by_position, strict=True)]
        return Speculated(positions, self.proposals - before.proposals, self.drafted - before.drafted)

    def acceptance(self, gamma: int) -> float:
        """How often a token is right if those before it were, of proposals of gamma tokens."""
        reached = self.proposals + sum(self.by_position[: gamma - 1])
        return sum(self.by_position[:gamma]) / reached


def messaging_counts(server: Server) -> list[float]:
    """Of the exchanges with the draft since the server's start, those whose way took up to 60 us, 100 us, 1 ms, and
    all."""
    name, found = "sirocco_speculation_messaging_seconds", server.metrics()
    within = [found.get(f'{name}_bucket{{le="{bound}"}}', 0.0) for bound in ("6e-05", "0.0001", "0.001")]
    return [*within, found.get(f"{name}_count", 0.0)]


def messaging_shares(server: Server, before: Sequence[float]) -> list[float]:
    """The same since messaging_counts(server) was that, as shares of all; none where the draft was not asked."""
    *within, count = (now - then for now, then in zip(messaging_counts(server), before, strict=True))
    return [round(number / count, 4) for number in within] if count else []


def main() -> None:
    args = _parser().parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    report: dict[str, Any] = {}
    with TemporaryDirectory() as temporary:
        bench = _Bench(args, args.folder or Path(temporary))
        for part in args.parts:
            report[part] = getattr(bench, part)()
            if args.json is not None:
                args.json.write_text(json.dumps(report, indent=1))
        bench.close()


class _Bench:
    """The parts, over models that are written when they are needed."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._pool = ProcessPoolExecutor(1)
        self._pool.submit(os.getpid).result()
        self._num_prompts = 0

    def close(self) -> None:
        self._pool.shutdown()

    def payoff(self) -> dict[str, Any]:
        pair = DraftPair(SHAPE, DRAFT_LAYERS, CHANGE)
        target, draft = self._target(pair), self._draft(pair)
        costs = measure_costs(target, draft, self._args)
        with _Serving(self._args, target, draft, "--fixed-draft-tokens") as server:
            self._round(server, 1, {"max_tokens": 4})
            before = Speculated.of(server)
            for _ in range(self._args.rounds):
                self._round(server, 1, {"max_tokens": 4})
            acceptance = (Speculated.of(server) - before).acceptance(4)
        expected, gamma = costs.best(acceptance)
        print(f"acceptance {acceptance:.3f}; {costs}; the formula: {expected:.2f} with {gamma}", flush=True)
        with _Serving(self._args, target, draft) as server:
            found = self._compare(server, 1, "payoff")
        found |= {"acceptance": acceptance, "costs": asdict(costs), "formula": expected, "formula_gamma": gamma}
        print(f"payoff: {found['ratio']:.3f}, {found['ratio'] / expected:.1%} of the formula", flush=True)
        return found

    def stranger(self) -> dict[str, Any]:
        pair = DraftPair(SHAPE, DRAFT_LAYERS, CHANGE)
        with _Serving(self._args, self._target(pair), self._stranger(pair)) as server:
            return self._compare(server, 1, "stranger")

    def batch(self) -> dict[str, Any]:
        pair = DraftPair(SHAPE, DRAFT_LAYERS, CHANGE)
        with _Serving(self._args, self._target(pair), self._draft(pair)) as server:
            return self._compare(server, BATCH, "batch")

    def sweep(self) -> dict[str, Any]:
        found, all_costs = [], []
        for change in SWEEP_CHANGES:
            pair = DraftPair(SHAPE, DRAFT_LAYERS, change)
            target, draft = self._target(pair), self._draft(pair)
            costs = measure_costs(target, draft, self._args)
            with _Serving(self._args, target, draft, "--fixed-draft-tokens") as server:
                self._round(server, 1, {})
                rates: dict[int, list[float]] = {gamma: [] for gamma in (0, *SWEEP_GAMMAS)}
                acceptances = []
                for _ in range(self._args.rounds):
                    prompts = self._prompts(1)
                    for gamma, its_rates in rates.items():
                        before = Speculated.of(server)
                        its_rates.append(self._rate(server, prompts, _asked(gamma)))
                        if gamma:
                            acceptances.append((Speculated.of(server) - before).acceptance(gamma))
            acceptance = median(acceptances)
            plain = rates.pop(0)
            measured = {gamma: paired_ratio(its_rates, plain).median for gamma, its_rates in rates.items()}
            found.append({"acceptance": acceptance, "measured": measured})
            all_costs.append(costs)
            if change != CHANGE:
                shutil.rmtree(target)
        # All targets are of one size: what they cost differs by the machine's moods alone.
        costs = StepCosts(
            [median(seconds) for seconds in zip(*(costs.verify for costs in all_costs), strict=True)],
            median(costs.draft for costs in all_costs),
        )
        print(f"{costs}\nspeed-up, in brackets the formula's, by number of drafted tokens:", flush=True)
        for row in found:
            ratios = (
                f"{g}: {ratio:.2f} ({costs.speedup(row['acceptance'], g):.2f})" for g, ratio in row["measured"].items()
            )
            print(f"acceptance {row['acceptance']:.3f}: {', '.join(ratios)}", flush=True)
        return {"costs": asdict(costs), "targets": found}

    def messaging(self) -> dict[str, Any]:
        found = {}
        for threads in sorted({1, self._args.threads}):
            args = argparse.Namespace(**{**vars(self._args), "threads": threads})
            for streams in (1, BATCH):
                pair = SMALL / "stories3M" / "hf", SMALL / "stories260K" / "hf"
                contents = [body(400, f"Once upon a time, {i}") for i in range(streams)]
                with _Serving(args, *pair, "--fixed-draft-tokens") as server:
                    server.measure(self._pool, contents)
                    before = messaging_counts(server)
                    count = before[-1]
                    while count - before[-1] < MESSAGES:
                        server.measure(self._pool, contents)
                        last, count = count, messaging_counts(server)[-1]
                        assert count > last, "the draft is not asked any more"
                    shares = messaging_shares(server, before)
                name = f"messaging, {threads} threads, {streams} streams"
                found[name] = shares
                print(f"{name}: share within 60 us, 100 us and 1 ms: {shares}", flush=True)
        return found

    def _compare(self, server: Server, streams: int, name: str) -> dict[str, Any]:
        """Pairs with and without speculation; the first one is not counted."""
        with_it, without = [], []
        before, messages = Speculated.of(server), messaging_counts(server)
        for number in range(-1, self._args.pairs):
            prompts = self._prompts(streams)
            fields = [{"enabled": True}, {"enabled": False}]
            if number % 2:
                fields.reverse()
            rates = {asked["enabled"]: self._rate(server, prompts, asked) for asked in fields}
            if number >= 0:
                with_it.append(rates[True])
                without.append(rates[False])
                print(f"{name}: {rates[True]:.2f} of {rates[False]:.2f} tok/s", flush=True)
            else:
                before, messages = Speculated.of(server), messaging_counts(server)
        ratio = paired_ratio(with_it, without)
        counts = Speculated.of(server) - before
        messaging = messaging_shares(server, messages)
        print(
            f"{name}: {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], {ratio.count} pairs; "
            f"{counts.drafted:.0f} drafted in {counts.proposals:.0f} proposals, {sum(counts.by_position):.0f} right\n"
            f"{name}: share of messaging within 60 us, 100 us and 1 ms: {messaging}",
            flush=True,
        )
        return {
            "ratio": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "pairs": ratio.count,
            "with": median(with_it),
            "without": median(without),
            "counts": asdict(counts),
            "messaging": messaging,
        }

    def _round(self, server: Server, streams: int, asked: dict[str, Any]) -> float:
        return self._rate(server, self._prompts(streams), asked)

    def _rate(self, server: Server, prompts: Sequence[list[int]], asked: dict[str, Any]) -> float:
        """Tokens a second of a stream for each prompt."""
        contents = [body(self._args.tokens, prompt, speculative=asked) for prompt in prompts]
        found = server.measure(self._pool, contents)
        return found.tokens / found.seconds

    def _prompts(self, streams: int) -> list[list[int]]:
        """Never used before, so that no cache has them."""
        self._num_prompts += streams
        return [token_ids(PROMPT_TOKENS, SHAPE.vocab_size, self._num_prompts - i) for i in range(streams)]

    def _target(self, pair: DraftPair) -> Path:
        return _written(self._folder / f"target-{pair.change:g}", pair.write_target)

    def _draft(self, pair: DraftPair) -> Path:
        return _written(self._folder / "draft", pair.write_draft)

    def _stranger(self, pair: DraftPair) -> Path:
        return _written(self._folder / "stranger", pair.write_stranger)


def _asked(gamma: int) -> dict[str, Any]:
    return {"max_tokens": gamma} if gamma else {"enabled": False}


def _written(folder: Path, write: Any) -> Path:
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        write(unfinished)
        unfinished.rename(folder)
    return folder


class _Serving:
    """A server with a target and a draft, whose replicas are two processes."""

    def __init__(self, args: argparse.Namespace, target: Path, draft: Path, *options: str) -> None:
        isq = [] if args.isq is None else ["--isq", args.isq, "--draft-isq", args.isq]
        threads = ["--threads", str(args.threads), "--max-seqs", str(BATCH), *args.server]
        models = ["-m", str(target), "-d", str(draft), "--draft-deadline-ms", "1000"]
        self._arguments = [*threads, "speculative", *models, *isq, "-n", str(MOST), "--speculation", "draft", *options]

    def __enter__(self) -> Server:
        self._server = Server(self._arguments)
        found = {process_kind(process): process.pid for process in psutil.process_iter()}
        assert found["Draft"] != found["Target"]
        self._wait_for_draft()
        return self._server

    def __exit__(self, *error: object) -> None:
        self._server.stop()

    def _wait_for_draft(self) -> None:
        """Until it proposes; the target can answer before."""
        end_s = time.monotonic() + 300
        with ProcessPoolExecutor(1) as pool:
            while not Speculated.of(self._server).drafted:
                assert time.monotonic() < end_s, "the draft proposes nothing"
                self._server.measure(pool, [body(8, speculative={"enabled": True})])


def measure_costs(target: Path, draft: Path, args: argparse.Namespace) -> StepCosts:
    """Both models alone in a process of its own, median of some steps."""
    with ProcessPoolExecutor(1) as pool:
        verify = pool.submit(_step_seconds, target, args.isq, args.threads, MOST).result()
    with ProcessPoolExecutor(1) as pool:
        return StepCosts(verify, pool.submit(_step_seconds, draft, args.isq, args.threads, 0).result()[0])


def _step_seconds(model: Path, isq: str | None, threads: int, most: int) -> list[float]:
    """Of steps over 1 to most + 1 tokens of a request with a short text."""
    from serve_app.engine.build import build_engine
    from serve_app.engine.speculation.step_timer import StepTimer
    from serve_app.options import EngineConfig, IsqOptions, ModelSource

    config = EngineConfig(device="cpu", max_seqs=1, num_threads=threads, pool_tokens=1024)
    source = ModelSource(str(model), isq=None if isq is None else IsqOptions(isq))
    engine = build_engine(source, config, lambda deltas: None)
    timer = StepTimer(engine.parts)
    timer.measure(1, 1)
    rounds = [[timer.measure(1, 1 + k) for k in range(most + 1)] for _ in range(9)]
    return [median(seconds) for seconds in zip(*rounds, strict=True)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["payoff", "stranger", "batch", "sweep", "messaging"]
    parser.add_argument("--parts", type=lambda text: text.split(","), default=parts)
    parser.add_argument("--isq", help="type of both models' weights; left out: bfloat16")
    parser.add_argument("--folder", type=Path, help="keeps the models here")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=num_physical_cores())
    parser.add_argument("--json", type=Path)
    parser.add_argument("server", nargs="*", help="options for the server, behind --")
    return parser


if __name__ == "__main__":
    # Ended from outside, it still ends what it has started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
