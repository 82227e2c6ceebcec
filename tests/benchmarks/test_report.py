"""Ratios, shares and tables from samples that are made up."""

from types import SimpleNamespace

import pytest

from benchmarks.cpu_speed.cells import Cell, Sample
from benchmarks.cpu_speed.engines import MISTRALRS, OPENVINO, SIROCCO
from benchmarks.cpu_speed.machine import Machine
from benchmarks.cpu_speed.model_facts import ModelFacts
from benchmarks.cpu_speed.plan import Results
from benchmarks.cpu_speed.report import better_peer, machine_json, markdown, run_json

PREFILL, DECODE = Cell("prefill", 100), Cell("decode", 0, 10)
FACTS = ModelFacts(weight_bytes=1_000_000, layer_products=900, head_products=10_000, vocab_size=100, kv_values=0)
MACHINE = Machine(
    {"processor": "a processor", "threads": 2, "system": "Linux", "python": "3.11"},
    {(2, True): [2e9, 3e9, 4e9]},
    {"int8": [1_000_000.0]},
)


def samples(rates: list[float], tokens: int, cpu_s: float | None = 1.0) -> dict[int, Sample]:
    """One a round."""
    return {i: Sample(tokens, tokens / rate, cpu_s) for i, rate in enumerate(rates)}


@pytest.fixture
def results() -> Results:
    found = Results()
    found.samples = {
        (PREFILL, SIROCCO): samples([200.0, 400.0, 300.0], 100),
        (PREFILL, "llama.cpp"): samples([100.0, 100.0, 100.0], 100, 2.0),
        (PREFILL, MISTRALRS): samples([160.0, 200.0, 150.0], 100, None),
        (PREFILL, OPENVINO): samples([100.0, 400.0, 200.0], 100),
        (DECODE, SIROCCO): samples([500.0, 500.0], 10),
        (DECODE, "llama.cpp"): samples([400.0, 250.0], 10, 2.0),
    }
    found.bandwidth = {PREFILL: [1e9], DECODE: [5e8, 5e8, 2e9]}
    found.errors = {MISTRALRS: ["decode at 0: gone"]}
    return found


def engines() -> list[SimpleNamespace]:
    """Names and facts are all that a report asks for."""
    names = (SIROCCO, "llama.cpp", MISTRALRS, OPENVINO)
    return [
        SimpleNamespace(name=name, facts={"version": "1", "kv": "f16", "load_s": 2.5, "peak_rss_mb": 800})
        for name in names
    ]


def test_the_better_peer_is_chosen_for_each_cell(results: Results) -> None:
    assert better_peer(PREFILL, results) == MISTRALRS
    assert better_peer(DECODE, results) == "llama.cpp"
    assert better_peer(Cell("prefill", 7), results) is None


def test_what_follows_from_the_samples(results: Results) -> None:
    run = run_json("m", "Q8_0", "f16", engines(), [PREFILL, DECODE], results, FACTS, MACHINE)  # type: ignore[arg-type]
    prefill, decode = run["cells"]
    assert prefill["to_better_peer"]["peer"] == MISTRALRS
    assert prefill["to_better_peer"]["median"] == 2.0
    assert prefill["to_better_peer"]["pairs"] == 3
    assert "cpu_time" not in prefill["to_better_peer"]
    assert prefill["to_openvino"]["median"] == 1.5
    assert prefill["engines"][SIROCCO]["cpu_ms_per_token"] == 10.0
    # (900 + 10000 / 100) products a token * 300 a second, of 1e6.
    assert prefill["engines"][SIROCCO]["share_of_dot_peak"]["int8"] == pytest.approx(0.3)
    # 1e6 bytes a token * 500 a second, of 1e9 on average.
    assert decode["engines"][SIROCCO]["share_of_bandwidth"] == pytest.approx(0.5)
    assert decode["to_better_peer"]["median"] == pytest.approx(1.625)
    assert decode["to_better_peer"]["cpu_time"]["median"] == 0.5
    assert MISTRALRS not in decode["engines"]


def test_the_share_of_what_was_read_in_turn(results: Results) -> None:
    cell = Cell("share", 0, 10)
    # 1e6 bytes a token * 500 a second, of 1e9; then twice as fast by either.
    pairs = ((500.0, 1e9), (1000.0, 1e9), (500.0, 5e8))
    results.samples[cell, SIROCCO] = {i: Sample(10, 10 / a, 1.0, b) for i, (a, b) in enumerate(pairs)}
    results.bandwidth[cell] = [1e12]
    run = run_json("m", "Q8_0", "f16", engines(), [cell], results, FACTS, MACHINE)  # type: ignore[arg-type]
    assert run["cells"][0]["engines"][SIROCCO]["share_of_bandwidth"] == pytest.approx(1.0)
    assert run["cells"][0]["read_GB_per_s"] == 1.0
    assert "to_better_peer" not in run["cells"][0]


def test_the_tables(results: Results) -> None:
    run = run_json("m", "Q8_0", "f16", engines(), [PREFILL, DECODE], results, FACTS, MACHINE)  # type: ignore[arg-type]
    text = markdown({"machine": machine_json(MACHINE), "runs": [run]})
    assert "| 2 threads, huge pages | 3.0 | 2.0–4.0 |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| prefill", "| decode"))]
    assert len({row.count("|") for row in rows}) == 1
    assert "300.0 (200.0–400.0)" in rows[0]
    assert "**2.00** [1.25, 2.00] mistral.rs" in rows[0]
    assert "| – |" in rows[1]
    assert "| 30% of int8 dots |" in rows[0]
    assert "| 50% of reading |" in rows[1]
    assert "mistral.rs: decode at 0: gone" in text
    assert "OpenVINO (1, KV f16, loaded in 2.5 s with 800 MB)" in text
    assert "CPU time 0.50 [0.50, 0.50]" in rows[1]
