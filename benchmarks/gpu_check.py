"""One command that says how good the GPU path is on this card, in less than ten minutes.

    python benchmarks/gpu_check.py [--minutes 9] [--json FILE] [--markdown FILE] [--parts parity,products]
    python benchmarks/gpu_check.py --interpret        # without a GPU: the kernels' parity in Triton's interpreter

Needs torch, triton, numpy, tokenizers and this repository; pytest and transformers where they are there. Weights are
random and made on the card. Parts run in the order of their weight: the card's own limits, the kernels' parity and the
tests marked gpu, then products, attention, the engine and the profile of a step, each until its share of the time is
up; what there was no time for is named.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu.report import Report

PARTS = ("limits", "parity", "tests", "products", "attention", "engine", "profile")
# Of the whole time, when a part must have ended.
_ENDS = {
    "limits": 0.1,
    "parity": 0.2,
    "tests": 0.4,
    "products": 0.55,
    "attention": 0.65,
    "engine": 0.95,
    "profile": 1.0,
}


def main(arguments: list[str] | None = None) -> int:
    """0 where every check and test passed, else 1."""
    args = _parser().parse_args(arguments)
    if args.interpret:
        # Before anything imports triton: it decides then.
        os.environ["TRITON_INTERPRET"] = "1"
        args.device, args.parts = "cpu", ["parity"]
    import torch

    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; --interpret checks the kernels without one", file=sys.stderr)
        return 1
    from benchmarks.gpu.report import Report

    report = Report(_machine(device))
    runner = _Runner(report, device, args.minutes * 60, is_tiny=args.tiny)
    for part in args.parts:
        runner.run(part)
        # After each part: a run that is ended early keeps what it has.
        if args.json is not None:
            args.json.write_text(json.dumps(report.to_json(), indent=1))
        if args.markdown is not None:
            args.markdown.write_text(report.markdown())
    print(report.markdown())
    return 1 if report.failures or runner.has_failed else 0


class _Runner:
    """Runs parts one by one and puts what they find into the report. A part that breaks is named, others go on."""

    def __init__(self, report: "Report", device: "torch.device", seconds: float, *, is_tiny: bool) -> None:
        self._report = report
        self._device = device
        self._start = time.monotonic()
        self._seconds = seconds
        self._is_tiny = is_tiny
        self.has_failed = False

    def run(self, part: str) -> None:
        """One of PARTS."""
        if not self._has_time("profile"):
            self._report.skipped.append(f"{part} (out of time)")
            return
        print(f"# {part}, {time.monotonic() - self._start:.0f} s after the start", flush=True)
        try:
            getattr(self, f"_{part}")()
        except Exception as error:
            self.has_failed = True
            self._report.skipped.append(f"{part} (broke: {type(error).__name__}: {error})")
        if not self._has_time(part):
            self._report.skipped.append(f"the rest of {part}")

    def _has_time(self, part: str) -> bool:
        return time.monotonic() - self._start < self._seconds * _ENDS[part]

    def _timed(self, part: str) -> Callable[[], bool]:
        return lambda: self._has_time(part)

    def _limits(self) -> None:
        from benchmarks.gpu import limits

        small = {"copy_bytes": 1 << 20, "side": 64} if self._is_tiny else {}
        self._report.limits = limits.measure(self._device, **small)

    def _parity(self) -> None:
        from benchmarks.gpu import parity

        for check in parity.check(self._device):
            self._report.checks.append(check)
            print(f"{check.name}: {check.failure or 'right'}", flush=True)

    def _tests(self) -> None:
        if self._device.type != "cuda":
            self._report.skipped.append("tests (they need a CUDA device)")
            return
        if importlib.util.find_spec("pytest") is None:
            self._report.skipped.append("tests (pytest is not installed)")
            return
        left_s = self._seconds * _ENDS["tests"] - (time.monotonic() - self._start)
        options = ["-q", "-rs", "-p", "no:cacheprovider", "-x", "--continue-on-collection-errors"]
        command = [
            sys.executable, "-m", "pytest", "-m", "gpu and not nightly", "-o", "addopts=--import-mode=importlib",
            *options, "tests/gpu_kernels", "tests/engine",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(30.0, left_s), check=False)
        # No test at all (pytest's status 5) is as bad as one that fails.
        self.has_failed |= done.returncode != 0
        self._report.tests = tests_summary(done.stdout) or done.stderr[-300:]
        if done.returncode != 0:
            print(done.stdout[-6000:], flush=True)

    def _products(self) -> None:
        from benchmarks.gpu import mixture, products
        from benchmarks.gpu.sizes import LLAMA_8B, QWEN3_30B, TINY, TINY_MIXTURE

        has_time = self._timed("products")
        sizes, rows = (TINY, (1,)) if self._is_tiny else (LLAMA_8B, products.ROWS)
        mixtures, mixture_rows = (TINY_MIXTURE, (1,)) if self._is_tiny else (QWEN3_30B, mixture.ROWS)
        for row in chain(
            products.measure(sizes, self._device, has_time, rows),
            mixture.measure(mixtures, self._device, has_time, mixture_rows),
        ):
            self._report.products.append(row)
            print(
                f"{row.name}, {row.rows} rows: {row.seconds * 1e6:.0f} us, {row.bytes_per_s / 1e9:.0f} GB/s", flush=True
            )

    def _attention(self) -> None:
        from benchmarks.gpu import attention
        from benchmarks.gpu.sizes import LLAMA_8B, TINY

        cells = ((64,), (1, 2)) if self._is_tiny else (attention.CONTEXTS, attention.BATCHES)
        sizes = TINY if self._is_tiny else LLAMA_8B
        for row in attention.measure(sizes, self._device, self._timed("attention"), *cells):
            self._report.attention.append(row)
            print(f"{row.backend}, {row.batch} x {row.context}: {row.bytes_per_s / 1e9:.0f} GB/s", flush=True)

    def _engine(self) -> None:
        from benchmarks.gpu import engine_speed
        from benchmarks.gpu.random_model import LAYOUTS
        from benchmarks.gpu.sizes import LLAMA_1B, LLAMA_8B, TINY

        has_time = self._timed("engine")
        runs = [(LLAMA_8B, LAYOUTS, engine_speed.LOADS, 64), (LLAMA_1B, LAYOUTS, engine_speed.LOADS[:1], 64)]
        if self._is_tiny:
            runs = [(TINY, ("bf16", "Q4_K_M"), (engine_speed.Load(1, 8), engine_speed.Load(2, 20)), 3)]
        first_sizes, _, loads, new_tokens = runs[0]
        theirs = engine_speed.transformers_row(first_sizes, self._device, loads[0], new_tokens)
        if theirs is None:
            self._report.skipped.append("transformers beside the engine (it is not installed)")
        else:
            self._report.speeds.append(theirs)
        for sizes, layouts, loads, new_tokens in runs:
            for row in engine_speed.measure(sizes, layouts, self._device, has_time, loads, new_tokens):
                self._report.speeds.append(row)
                print(f"{sizes.name} {row.layout}, {row.load}: {row.tokens_per_s:.0f} tok/s", flush=True)
        self._compiled_transformers()

    def _compiled_transformers(self) -> None:
        """As transformers generates by itself; last, since to compile takes a minute or more."""
        from benchmarks.gpu import engine_speed
        from benchmarks.gpu.sizes import LLAMA_8B

        if self._device.type != "cuda":
            self._report.skipped.append("transformers compiled (it does so on a GPU alone)")
        elif not self._has_time("engine"):
            self._report.skipped.append("transformers compiled (out of time)")
        elif theirs := engine_speed.transformers_row(LLAMA_8B, self._device, engine_speed.LOADS[0], compiles=True):
            self._report.speeds.append(theirs)

    def _profile(self) -> None:
        from benchmarks.gpu.engine_speed import EngineUnderTest, Load
        from benchmarks.gpu.sizes import LLAMA_8B
        from benchmarks.gpu.step_profile import profile_decode

        if self._device.type != "cuda":
            self._report.skipped.append("profile (it needs a CUDA device)")
            return
        loads = (Load(1, 128), Load(64, 256))
        tested = EngineUnderTest(LLAMA_8B, "bf16", self._device, loads, 64)
        for load in loads:
            name = f"bf16, {load.batch} x {load.prompt}"
            self._report.profiles[name] = profile_decode(tested, load)
        tested.close()


def tests_summary(output: str) -> str:
    """pytest's last line, and why tests were skipped, each reason once."""
    lines = output.strip().splitlines()
    reasons = [line.rsplit(": ", 2)[-2:] for line in lines if line.startswith("SKIPPED")]
    skipped = "; ".join(dict.fromkeys(": ".join(reason) for reason in reasons))
    return (lines[-1] if lines else "") + (f" (skipped: {skipped})" if skipped else "")


def _machine(device: "torch.device") -> dict[str, str]:
    import torch

    versions = {"torch": torch.__version__, "Python": sys.version.split()[0]}
    if importlib.util.find_spec("triton") is not None:
        import triton

        versions["Triton"] = triton.__version__
    name = "CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions["CUDA"] = str(torch.version.cuda)
    return {name: "", **versions}


def _parts(text: str) -> list[str]:
    words = [word for word in text.split(",") if word]
    if unknown := set(words) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    return words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help="separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--interpret", action="store_true", help="parity alone, in Triton's interpreter, without a GPU")
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1, tries the code out")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: to try the code out, not to measure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
