"""Runs the other tests of this folder in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def run(mark: str, timeout_s: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", mark, str(FOLDER)]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.timeout(600)
def test_kernels_in_the_interpreter() -> None:
    run("not nightly and not gpu", 590)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_kernels_in_the_interpreter_at_length() -> None:
    run("nightly and not gpu", 7190)
