"""Peak anonymous memory of quantisation: at load the result and little more, of files pieces, never the source."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quantize import anonymous_bytes
from serve_app.engine.calibration import memory_bytes
from serve_app.loaders.model_files import resolve
from serve_app.loaders.recode import PIECE_BYTES
from serve_app.loaders.weight_files import EMBEDDED_MODEL
from serve_app.options import ModelSource
from tests.loaders.conftest import BIG, BIG_VOCAB

MB = 1e6
STORIES = Path(__file__).parents[1] / "data" / "models" / "stories3M" / "hf"
SLACK = 24 * MB
"""A piece of the result and, for each thread, a few decoded rows; HQQ: a whole matrix, 6 MB here."""


def peak_of(work: str, small: dict[str, Any], big: dict[str, Any]) -> tuple[float, float]:
    """Anonymous bytes that a work of isq_probe with big added at its peak, and at its end, after one with small."""
    command = [sys.executable, str(Path(__file__).with_name("isq_probe.py")), work]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, json.dumps(small), json.dumps(big)], stdin=pipe, stdout=pipe, text=True) as probe:
        assert probe.stdin is not None
        assert probe.stdout is not None
        while (line := probe.stdout.readline()) != "ready\n":
            assert line
        before = anonymous_bytes(probe.pid)
        peak, is_over = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not is_over.is_set():
                peak = max(peak, anonymous_bytes(probe.pid))
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        probe.stdin.write("\n")
        probe.stdin.flush()
        while (line := probe.stdout.readline()) != "loaded\n":
            assert line
        is_over.set()
        watcher.join()
        after = anonymous_bytes(probe.pid)
        probe.communicate("\n", timeout=30)
    return peak - before, after - before


def check(big_folder: Path, isq: str, bits: float) -> None:
    source = (big_folder / "model.safetensors").stat().st_size
    expected = source / 2 * bits / 8
    peak, after = peak_of("load", {"model": str(EMBEDDED_MODEL), "type": isq}, {"model": str(big_folder), "type": isq})
    assert 0.9 * expected < after < 1.1 * expected + 32 * MB
    assert peak < after + SLACK
    assert peak < source  # what a copy of the source would take


def test_the_result_and_little_more(big_folder: Path) -> None:
    check(big_folder, "Q4_0", 4.7)


@pytest.mark.nightly
@pytest.mark.parametrize(("isq", "bits"), [("Q8_0", 8.5), ("Q6_K", 6.7), ("HQQ4", 5.3)])
def test_the_result_and_little_more_of_other_types(isq: str, bits: float, big_folder: Path) -> None:
    check(big_folder, isq, bits)


def test_a_calibration_takes_what_is_said_before(big_folder: Path) -> None:
    small = {"model": str(EMBEDDED_MODEL), "tokenizer": str(STORIES)}
    peak, _ = peak_of("calibrate", small, {"model": str(big_folder), "tokenizer": str(STORIES)})
    expected = memory_bytes(resolve(ModelSource(model=str(big_folder), tokenizer=str(STORIES))))
    assert 0.9 * expected < peak < expected + SLACK


@pytest.mark.parametrize("target", ["a.gguf", "a"])
def test_files_are_quantised_piece_by_piece(target: str, big_folder: Path, tmp_path: Path) -> None:
    """The bound that is promised for any model, and, since a small one is far below it, one of a few pieces."""
    small, big = (
        {"model": str(model), "output": str(tmp_path / f"{name}-{target}"), "isq": "Q4_K", "tokenizer": str(STORIES)}
        for name, model in (("small", STORIES), ("big", big_folder))
    )
    peak, _ = peak_of("quantize", small, big)
    written = tmp_path / f"big-{target}"
    size = (written if written.is_file() else written / "model.safetensors").stat().st_size
    largest = 2 * BIG_VOCAB * BIG
    assert peak < size + 2 * largest + 600 * MB
    assert peak < 4 * PIECE_BYTES
