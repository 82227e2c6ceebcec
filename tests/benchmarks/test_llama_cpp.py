"""llama.cpp's programs, as small scripts that answer like them."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.cpu_speed.cells import Cell
from benchmarks.cpu_speed.engine import EngineError
from benchmarks.cpu_speed.llama_cpp import LlamaCpp, batched_bench_arguments, bench_arguments, cpu_s_of, parse_bench

RESULT = {
    "build_commit": "0c1e570", "build_number": 7, "model_type": "llama 1B Q8_0", "n_prompt": 0, "n_gen": 64,
    "avg_ns": 2_000_000_000, "samples_ns": [1_000_000_000, 3_000_000_000],
}  # fmt: skip
BATCH = {"pp": 32, "tg": 16, "pl": 4, "t_pp": 1.0, "t_tg": 0.5}


def program(path: Path, body: str) -> Path:
    """An executable Python script."""
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)
    return path


def answering(path: Path, value: object, note: str = "") -> Path:
    """One that notes something, then gives a JSON line, and keeps its arguments beside it."""
    return program(
        path,
        f"open({str(path)!r} + '.arguments', 'w').write(' '.join(sys.argv[1:]))\n"
        f"print({note!r}, file=sys.stderr)\nprint('not JSON')\nprint({json.dumps(value)!r})",
    )


def test_a_decode_is_told_and_read(tmp_path: Path) -> None:
    bench = answering(tmp_path / "llama-bench", RESULT, "llama-bench: benchmark 1/1: generation run 1/1")
    engine = LlamaCpp(bench, tmp_path / "m.gguf", 2, "f16")
    sample = engine.measure(Cell("decode", 1024, 64), 0)
    assert (sample.tokens, sample.seconds, sample.rate) == (64, 2.0, 32.0)
    assert engine.facts["version"] == "0c1e570 (7)"
    told = Path(f"{bench}.arguments").read_text()
    assert "-p 0 -n 64 -d 1024" in told
    assert "-t 2 -ctk f16 -ctv f16" in told


def test_a_batch_goes_to_the_program_beside_it(tmp_path: Path) -> None:
    bench = answering(tmp_path / "llama-bench", RESULT)
    engine = LlamaCpp(bench, tmp_path / "m.gguf", 2, "f16")
    cell = Cell("batch", 32, 16, 4)
    assert not engine.can(cell)
    answering(tmp_path / "llama-batched-bench", BATCH)
    assert engine.can(cell)
    assert engine.measure(cell, 0).rate == 128.0


def test_the_sizes_of_a_cell() -> None:
    assert bench_arguments(Cell("prefill", 512))[:6] == ["-p", "512", "-n", "0", "-d", "0"]
    told = batched_bench_arguments(Cell("batch", 32, 64, 16))
    assert told[told.index("-c") + 1] == str(16 * 256)
    assert told[told.index("-npl") + 1] == "16"


def test_processor_time_is_that_of_the_run_alone(tmp_path: Path) -> None:
    body = (
        "import time\n"
        "def burn(s):\n"
        "    end = time.process_time() + s\n"
        "    while time.process_time() < end: pass\n"
        "burn(0.3)\n"
        "print('llama-bench: benchmark 1/1: prompt run 1/1', file=sys.stderr, flush=True)\n"
        f"time.sleep(0.2); burn(0.1)\nprint({json.dumps(RESULT)!r}, flush=True)\n"
        "time.sleep(0.2); burn(0.1)"
    )
    engine = LlamaCpp(program(tmp_path / "llama-bench", body), tmp_path / "m.gguf", 2, "f16")
    cpu_s = engine.measure(Cell("prefill", 64), 0).cpu_s
    assert cpu_s is not None
    assert 0.05 <= cpu_s <= 0.25


def test_a_program_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = program(tmp_path / "llama-bench", "print('no such model', file=sys.stderr)\nsys.exit(3)")
    with pytest.raises(EngineError, match=r"ended with 3: no such model"):
        LlamaCpp(broken, tmp_path / "m.gguf", 2, "f16").measure(Cell("prefill", 64), 0)


def test_a_program_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="llama-bench cannot be run"):
        LlamaCpp(tmp_path / "llama-bench", tmp_path / "m.gguf", 2, "f16").measure(Cell("prefill", 64), 0)


def test_output_without_a_result_is_quoted() -> None:
    with pytest.raises(EngineError, match="out of memory"):
        parse_bench(["out of memory\n"], None)


def test_a_process_that_is_gone_has_no_time(tmp_path: Path) -> None:
    assert cpu_s_of(1, tmp_path) is None
    (tmp_path / "7").mkdir()
    fields = ["7", "(a (b) c)", "S", *["0"] * 10, "150", "50", *["0"] * 30]
    (tmp_path / "7" / "stat").write_text(" ".join(fields))
    assert cpu_s_of(7, tmp_path) == 2.0
