"""Pairs of the server and the engine alone, with both of them made up."""

import json
from collections import Counter
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import http_cpu
from benchmarks.cpu_speed.cells import Cell, Sample
from benchmarks.overhead import Round

CELL = Cell("serve", 4, 10, 2)


class Fakes:
    """Both sides, with one log of who was measured with what."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.alone = SimpleNamespace(measure=self._alone)
        self.server = SimpleNamespace(measure=self._served, watch_cpu=lambda: lambda: Counter({"Ray": 0.8}))

    def _alone(self, cell: Cell, seed: int) -> Sample:
        self.log.append(("alone", seed))
        return Sample(cell.num_tokens, 1.0, 1.2)

    def _served(self, pool: object, contents: list[bytes]) -> Round:
        self.log.append(("served", [json.loads(content)["prompt"] for content in contents]))
        return Round(20, 1.25, Counter({"Target": 1.6, "Ingress": 0.4}))


@pytest.fixture(autouse=True)
def two_seconds_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine alone computes for one second of two; the idle server takes 0.8 in both."""
    monkeypatch.setattr(http_cpu, "time", SimpleNamespace(perf_counter=partial(next, count(0.0, 2.0))))


def pair(fakes: Fakes, number: int) -> tuple[Sample, Sample]:
    """(served, alone)."""
    return http_cpu._measure_pair(fakes.alone, fakes.server, None, CELL, number, 50)  # type: ignore[arg-type]


def test_who_begins_changes_from_pair_to_pair() -> None:
    fakes = Fakes()
    for number in range(3):
        pair(fakes, number)
    assert [who for who, _ in fakes.log] == ["alone", "served", "served", "alone", "alone", "served"]


def test_no_prompt_is_used_twice() -> None:
    fakes = Fakes()
    for number in range(3):
        pair(fakes, number)
    prompts = [tuple(prompt) for who, what in fakes.log if who == "served" for prompt in what]
    assert len(set(prompts)) == len(prompts) == 6
    assert all(len(prompt) == 4 and max(prompt) < 50 for prompt in prompts)
    assert len({what for who, what in fakes.log if who == "alone"}) == 3


def test_ratios_and_processor_time_of_all_processes() -> None:
    fakes = Fakes()
    found = http_cpu._summary(CELL, [pair(fakes, number) for number in range(4)])
    assert (found["served_tok_per_s"], found["alone_tok_per_s"]) == (16.0, 20.0)
    assert found["ratio"]["median"] == 0.8
    assert found["ratio"]["cpu_time"]["median"] == 1.25
    assert found["served_cpu_ms_per_token"] == 100.0
    assert found["alone_cpu_ms_per_token"] == pytest.approx((1.2 + 0.8 / 2) / 20 * 1e3)
    table = http_cpu._table([found])
    assert "**0.800** [0.800, 0.800], 4 pairs" in table
    assert "| 1.250 [1.250, 1.250] |" in table
