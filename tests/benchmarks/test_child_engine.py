"""Engines in processes of their own, played by a script over the real loop."""

import sys
from pathlib import Path

import pytest

from benchmarks.cpu_speed.cells import Cell
from benchmarks.cpu_speed.child_engine import CHILDREN, ChildEngine
from benchmarks.cpu_speed.engine import EngineError

FAKE = """
import os, sys
sys.path.insert(0, {children!r})
from child_loop import serve

def load(options):
    print("a library's chatter")
    seen = []
    def measure(cell):
        seen.append(cell["seed"])
        if cell["prompt"] == 13:
            raise ValueError("an unlucky number")
        if cell["prompt"] == 666:
            print("dying", file=sys.stderr, flush=True)
            os._exit(1)
        return {{"tokens": cell["prompt"], "seconds": 2.0, "cpu_s": float(len(seen))}}
    return measure, {{"version": options["version"]}}

serve(load)
"""


@pytest.fixture
def engine(tmp_path: Path) -> ChildEngine:
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(children=str(CHILDREN)))
    return ChildEngine("fake", [sys.executable, str(script)], {"version": "7"}, 0)


def test_a_cell_is_measured_twice_at_first_and_once_from_then_on(engine: ChildEngine) -> None:
    assert not engine.is_loaded
    first = engine.measure(Cell("prefill", 100), 0)
    assert (first.tokens, first.rate, first.cpu_s) == (100, 50.0, 2.0)
    assert engine.measure(Cell("prefill", 100), 1).cpu_s == 3.0
    assert engine.measure(Cell("prefill", 200), 0).cpu_s == 5.0
    assert engine.is_loaded
    assert engine.facts["version"] == "7"
    assert engine.facts["peak_rss_mb"] > 1
    engine.stop()
    assert not engine.is_loaded


def test_it_starts_again_after_a_stop(engine: ChildEngine) -> None:
    engine.measure(Cell("prefill", 100), 0)
    engine.stop()
    engine.stop()
    assert engine.measure(Cell("prefill", 100), 1).cpu_s == 2.0
    engine.stop()


def test_an_error_in_a_cell_leaves_the_process_alive(engine: ChildEngine) -> None:
    with pytest.raises(EngineError, match="fake: ValueError: an unlucky number"):
        engine.measure(Cell("prefill", 13), 0)
    assert engine.measure(Cell("prefill", 100), 0).tokens == 100
    engine.stop()


def test_the_last_words_of_a_process_that_dies(engine: ChildEngine) -> None:
    with pytest.raises(EngineError, match=r"(?s)its process ended; it said last: .*dying"):
        engine.measure(Cell("prefill", 666), 0)
    assert not engine.is_loaded


def test_a_python_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nothing cannot be run"):
        ChildEngine("fake", [str(tmp_path / "nothing")], {}, 0).measure(Cell("prefill", 1), 0)
