"""Times `sirocco quantize` beside llama-quantize on one GGUF: seconds, and the peak of anonymous memory.

Both run one after the other in rounds, with as many threads, on a file that has been read before. Prints a line of JSON
for every type: the median seconds of each, their ratio, the same for what processors have worked (which says more on a
machine that does other things too), and Sirocco's peak memory beside what it may take.

A second line says what in-situ quantization takes: from the start of a process until the engine is ready, beside
llama-quantize and then the same start with the file that it wrote, and the peak of anonymous memory beside its limit
(the result, the two largest tensors of the source, and 600 MB).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from serve_app.gguf_file import open_gguf

ALLOWANCE_BYTES = 600 << 20


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0


def timed(command: Sequence[str]) -> tuple[float, float, int]:
    """Seconds from start to end, those that processors have worked, and the peak of anonymous memory."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # A file: what a program says may be more than a pipe holds, and nobody reads meanwhile.
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=words)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)
        seconds = time.monotonic() - started
        if process.returncode:
            words.seek(0)
            raise SystemExit(f"{command[0]} failed: {words.read().decode(errors='replace')[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def measure(
    model: Path, name: str, llama_quantize: str, threads: int, rounds: int, folder: Path, *, is_pure: bool = False
) -> dict[str, object]:
    """One line of the result."""
    ours, theirs = folder / "sirocco.gguf", folder / "llama.gguf"
    sirocco = [sys.executable, "-m", "serve_app", "quantize", "-m", str(model), "--isq", name, "-o", str(ours)]
    sirocco += ["--isq-organization", "pure"] if is_pure else []
    llama = [llama_quantize, *(["--pure"] if is_pure else []), str(model), str(theirs), name, str(threads)]
    times: dict[str, list[tuple[float, float]]] = {"sirocco": [], "llama": []}
    peak = 0
    for _ in range(rounds):
        seconds, worked, memory = timed([*sirocco, "--threads", str(threads)])
        times["sirocco"].append((seconds, worked))
        peak = max(peak, memory)
        times["llama"].append(timed(llama)[:2])
    passed, worked_all = _medians(times)
    return {
        "type": f"{name} pure" if is_pure else name,
        "seconds": passed,
        "ratio": round(passed["sirocco"] / passed["llama"], 3),
        "processor_seconds": worked_all,
        "processor_ratio": round(worked_all["sirocco"] / worked_all["llama"], 3),
        "rss_anon_mib": peak >> 20,
        "limit_mib": (ours.stat().st_size + ALLOWANCE_BYTES) >> 20,
        "bytes": {"sirocco": ours.stat().st_size, "llama": theirs.stat().st_size},
    }


def _medians(times: Mapping[str, Sequence[tuple[float, float]]]) -> tuple[dict[str, float], dict[str, float]]:
    """Of pairs of seconds: those that passed, and those that processors have worked."""
    passed, worked = (
        {way: round(statistics.median(pair[i] for pair in pairs), 2) for way, pairs in times.items()} for i in (0, 1)
    )
    return passed, worked


_START = """
import sys
from serve_app.engine.start import start_engine
from serve_app.options import EngineConfig, IsqOptions, ModelSource

isq = IsqOptions(type=sys.argv[2]) if sys.argv[2] else None
config = EngineConfig(max_seqs=1, pool_tokens=512, num_threads=int(sys.argv[3]))
start_engine(ModelSource(model=sys.argv[1], isq=isq, max_seq_len=512), config, lambda deltas: None)
"""


def measure_start(
    model: Path, name: str, llama_quantize: str, threads: int, rounds: int, folder: Path
) -> dict[str, object]:
    """The second line of the result."""
    quantised = folder / "llama.gguf"
    start = [sys.executable, "-c", _START]
    times: dict[str, list[tuple[float, float]]] = {"isq": [], "llama_then_start": []}
    peak = 0
    for _ in range(rounds):
        seconds, worked, memory = timed([*start, str(model), name, str(threads)])
        times["isq"].append((seconds, worked))
        peak = max(peak, memory)
        made = timed([llama_quantize, str(model), str(quantised), name, str(threads)])
        started = timed([*start, str(quantised), "", str(threads)])
        times["llama_then_start"].append((made[0] + started[0], made[1] + started[1]))
    passed, worked_all = _medians(times)
    with open_gguf(model) as file:
        largest = sorted(file.data(name).size for name in file.tensors)[-2:]
    return {
        "type": name,
        "seconds_until_ready": passed,
        "ratio": round(passed["isq"] / passed["llama_then_start"], 3),
        "processor_seconds": worked_all,
        "processor_ratio": round(worked_all["isq"] / worked_all["llama_then_start"], 3),
        "rss_anon_mib": peak >> 20,
        "limit_mib": (quantised.stat().st_size + sum(largest) + ALLOWANCE_BYTES) >> 20,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF in BF16, F16 or F32")
    parser.add_argument("--llama-quantize", default="llama-quantize", help="the program to compare with")
    parser.add_argument("--types", default="Q4_K_M,Q8_0", help="separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pure", action="store_true", help="all matrices in the one type, embedding and head too")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.model.parent) as folder:
        for name in options.types.split(","):
            line = measure(
                options.model, name, options.llama_quantize, options.threads, options.rounds, Path(folder),
                is_pure=options.pure,
            )  # fmt: skip
            print(json.dumps(line), flush=True)
            if options.pure:
                continue  # a start is compared in the ordinary mixes
            line = measure_start(
                options.model, name, options.llama_quantize, options.threads, options.rounds, Path(folder)
            )
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
