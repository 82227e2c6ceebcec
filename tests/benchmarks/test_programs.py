"""Every benchmark can be imported, and those that start no server run."""

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks import decode_step

PROGRAMS = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


def test_a_decode_step_is_more_than_its_forward(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["decode_step", "--steps", "3", "--batches", "2"])
    decode_step.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 |")]
    step, forward, outside = (int(cell.split()[0]) for cell in row.strip("| ").split("|")[1:])
    assert step > forward > 0
    assert outside > 0
