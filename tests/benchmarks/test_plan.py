"""Rounds of engines in turn, with engines that are only lists."""

from typing import Any

import pytest

from benchmarks.cpu_speed.cells import Cell, Sample, make_cells
from benchmarks.cpu_speed.engine import EngineError
from benchmarks.cpu_speed.plan import RESERVE_BYTES, Results, make_room, run_rounds

PREFILL = Cell("prefill", 128)


class Fake:
    """Writes into a log that it was measured; takes memory while it is loaded."""

    def __init__(self, name: str, log: list[str], needed_bytes: int = 0) -> None:
        self.name = name
        self.needed_bytes = needed_bytes
        self.is_loaded = False
        self.facts: dict[str, Any] = {}
        self.fails_at: int | None = None
        self._log = log

    def can(self, cell: Cell) -> bool:
        return cell.kind != "batch" or self.name != "single"

    def measure(self, cell: Cell, seed: int) -> Sample:
        if seed == self.fails_at:
            raise EngineError("broken")
        self.is_loaded = True
        self._log.append(self.name)
        return Sample(cell.num_tokens, 1.0 + seed, 0.5)

    def stop(self) -> None:
        self.is_loaded = False
        self._log.append(f"stop {self.name}")


def run(engines: list[Fake], cells: list[Cell], rounds: int) -> Results:
    """Without memory limits, at a bandwidth of 1."""
    return run_rounds(engines, cells, rounds, lambda: 1.0, lambda text: None, lambda: 1 << 50)


def test_who_begins_changes_from_round_to_round() -> None:
    log: list[str] = []
    results = run([Fake("a", log), Fake("b", log), Fake("c", log)], [PREFILL], 4)
    assert log == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]
    assert [s.seconds for s in results.of(PREFILL, "b")] == [1.0, 2.0, 3.0, 4.0]
    assert results.bandwidth[PREFILL] == [1.0] * 4


def test_only_engines_that_have_the_cell_are_asked() -> None:
    log: list[str] = []
    batch = Cell("batch", 32, 64, 8)
    run([Fake("single", log), Fake("b", log)], [batch], 2)
    assert log == ["b", "b"]


def test_an_engine_that_fails_is_left_out_of_the_rest_of_the_cell() -> None:
    log: list[str] = []
    a, b = Fake("a", log), Fake("b", log)
    a.fails_at = 1
    other = Cell("prefill", 512)
    results = run([a, b], [PREFILL, other], 3)
    assert [s.seconds for s in results.of(PREFILL, "a")] == [1.0]
    assert len(results.of(PREFILL, "b")) == 3
    assert results.errors == {"a": ["prefill 128: broken", "prefill 512: broken"]}
    pairs = results.pairs(PREFILL, "a", "b")
    assert [(x.seconds, y.seconds) for x, y in pairs] == [(1.0, 1.0)]


def test_the_largest_engine_makes_room_first() -> None:
    log: list[str] = []
    small, large, new = Fake("small", log, 10), Fake("large", log, 100), Fake("new", log, 50)
    small.is_loaded = large.is_loaded = True

    def free_bytes() -> int:
        return RESERVE_BYTES + 120 - sum(e.needed_bytes for e in (small, large) if e.is_loaded)

    make_room(new, [small, large, new], free_bytes)
    assert log == ["stop large"]
    assert small.is_loaded


def test_an_engine_that_fits_nowhere_is_an_error_of_its_own() -> None:
    log: list[str] = []
    results = run_rounds([Fake("big", log, 1 << 40)], [PREFILL], 1, lambda: 1.0, lambda text: None, lambda: 1 << 30)
    assert "needs 1024.0 GiB" in results.errors["big"][0]
    with pytest.raises(EngineError, match="1\\.0 GiB are free"):
        make_room(Fake("big", log, 1 << 40), [], lambda: 1 << 30)


def test_the_cells_of_a_run() -> None:
    cells = make_cells([128], [0, 1024], [1, 8], 64)
    assert [cell.label for cell in cells] == [
        *("prefill 128", "decode at 0", "decode at 0, reading in turn"),
        *("decode at 1024", "decode at 1024, reading in turn", "batch 8"),
    ]
    assert [cell.num_tokens for cell in cells] == [128, 64, 64, 64, 64, 512]
