"""Peak anonymous memory of in-situ quantization: the result and little more, never the source."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quantize import anonymous_bytes
from serve_app.loaders.weight_files import EMBEDDED_MODEL

MB = 1e6
SLACK = 24 * MB
"""A piece of the result and, for each thread, a few decoded rows; HQQ: a whole matrix, 6 MB here."""


def peak_of(model: Path, **isq: Any) -> tuple[float, float]:
    """Anonymous bytes that loading added at its peak, and at its end."""
    command = [sys.executable, str(Path(__file__).with_name("isq_probe.py")), str(EMBEDDED_MODEL), str(model)]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, json.dumps(isq)], stdin=pipe, stdout=pipe, text=True) as probe:
        assert probe.stdin is not None
        assert probe.stdout is not None
        assert probe.stdout.readline() == "ready\n"
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
        assert probe.stdout.readline() == "loaded\n"
        is_over.set()
        watcher.join()
        after = anonymous_bytes(probe.pid)
        probe.communicate("\n", timeout=30)
    return peak - before, after - before


def check(big_folder: Path, isq: str, bits: float) -> None:
    source = (big_folder / "model.safetensors").stat().st_size
    expected = source / 2 * bits / 8
    peak, after = peak_of(big_folder, type=isq)
    assert 0.9 * expected < after < 1.1 * expected + 32 * MB
    assert peak < after + SLACK
    assert peak < source  # what a copy of the source would take


def test_the_result_and_little_more(big_folder: Path) -> None:
    check(big_folder, "Q4_0", 4.7)


@pytest.mark.nightly
@pytest.mark.parametrize(("isq", "bits"), [("Q8_0", 8.5), ("Q6_K", 6.7), ("HQQ4", 5.3)])
def test_the_result_and_little_more_of_other_types(isq: str, bits: float, big_folder: Path) -> None:
    check(big_folder, isq, bits)
