"""The GPU's measuring command, tried out where there is none: in Triton's interpreter, on tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import products
from benchmarks.gpu.report import Report
from benchmarks.gpu.step_profile import Span, summary

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.timeout(300)
def test_kernels_are_checked_without_a_gpu() -> None:
    done = run("--interpret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Q4_K: right" in done.stdout
    assert "attention, triton: right" in done.stdout


@pytest.mark.timeout(300)
def test_parts_run_and_are_reported(tmp_path: Path) -> None:
    files = tmp_path / "found.json", tmp_path / "found.md"
    done = run(
        "--device", "cpu", "--tiny", "--parts", "limits,products,attention,engine,profile", "--json", str(files[0]),
        "--markdown", str(files[1]),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(files[0].read_text())
    assert found["limits"]["bandwidth"] > 0
    products = {row["name"]: row for row in found["products"]}
    assert {"bf16 (torch)", "bf16 (as loaded)", "Q4_K", "HQQ8"} < products.keys()
    for name, bits in (("bf16", 16), ("Q4_K", 4.625)):
        row = products[f"{name}, tiny's experts"]
        assert row["rows"] == 1
        assert row["weight_bytes"] == 2 * 3 * 256 * 256 * bits / 8, "one token takes two of four experts"
        assert row["products"] == 2 * 3 * 256 * 256
    assert {row["backend"] for row in found["attention"]} == {"triton", "torch"}
    speeds = [(row["engine"], row["layout"], row["load"]["batch"], row["tokens"]) for row in found["speeds"]]
    assert speeds == [
        ("transformers (static cache, not compiled)", "bf16", 1, 2),
        ("Sirocco", "bf16", 1, 2), ("Sirocco", "bf16", 2, 4),
        ("Sirocco, no graphs", "bf16", 1, 2), ("Sirocco", "Q4_K_M", 1, 2), ("Sirocco", "Q4_K_M", 2, 4),
        ("Sirocco, no graphs", "Q4_K_M", 1, 2),
    ]  # fmt: skip
    assert found["skipped"] == [
        "transformers compiled (it does so on a GPU alone)",
        "profile (it needs a CUDA device)",
    ]
    assert "| Sirocco | Q4_K_M | 2 x 20 |" in files[1].read_text()


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--tiny", "--parts", "attention", "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert "Not done: attention (out of time)." in done.stdout


def test_tests_that_did_not_run_are_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest ends with status 5 where it found none."""
    report = Report({})
    runner = gpu_check._Runner(report, torch.device("cuda"), 1e6, is_tiny=True)
    for status, has_failed in ((0, False), (5, True)):
        done = subprocess.CompletedProcess(
            [], status, "SKIPPED [2] a.py:1: flashinfer: not here\n1 passed, 2 skipped\n"
        )
        monkeypatch.setattr(subprocess, "run", lambda *command, done=done, **options: done)
        runner._tests()
        assert runner.has_failed == has_failed
        assert report.tests == "1 passed, 2 skipped (skipped: flashinfer: not here)"
    runner = gpu_check._Runner(report, torch.device("cpu"), 1e6, is_tiny=True)
    runner._tests()
    assert report.skipped == ["tests (they need a CUDA device)"]


def test_an_int4_of_other_torches_is_left_out_but_errors_of_the_card_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        raise error

    for error in (AttributeError("no such operator"), NotImplementedError("not here"), RuntimeError("of 4 arguments")):
        monkeypatch.setattr(products, "_int4", lambda *sizes, error=error: fail(error))
        assert not products._has_int4(torch.device("cpu"))
        assert f"int4 (torch): not measured ({error})" in capsys.readouterr().out
    for error in (torch.OutOfMemoryError("of 80 GB"), torch.AcceleratorError("illegal memory access")):
        monkeypatch.setattr(products, "_int4", lambda *sizes, error=error: fail(error))
        with pytest.raises(type(error)):
            products._has_int4(torch.device("cpu"))


def test_an_unknown_part_is_refused() -> None:
    done = run("--parts", "speed")
    assert done.returncode == 2
    assert "speed: parts are limits, parity" in done.stderr


def test_busy_share_and_gaps_of_spans_that_overlap() -> None:
    spans = [Span("c", 30, 40), Span("a", 0, 10), Span("b", 5, 12), Span("d", 41, 51), Span("e", 32, 36)]
    found = summary(spans, steps=2, num_gaps=1)
    assert found.step_us == 51 / 2
    assert found.busy_share == (12 + 10 + 10) / 51
    assert found.kernels_per_step == 2.5
    [gap] = found.gaps
    assert (gap.before, gap.after, gap.us) == ("b", "c", 18)
