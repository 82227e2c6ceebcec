import pickle
from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from serve_app.engine.stats import DraftStats, SpeculationCounts
from serve_app.metrics import (
    EXCHANGE_S,
    METRICS,
    HttpMetrics,
    draft_snapshot,
    engine_snapshot,
    exchange_snapshot,
    merge_snapshots,
    process_snapshot,
    render,
)


def _samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def _http(code: int, seconds: float) -> HttpMetrics:
    metrics = HttpMetrics()
    metrics.requests["/v1/completions", code] += 1
    metrics.first_token.observe(seconds)
    metrics.inter_token.observe(0.004, 3)
    return metrics


def _engine(**fields: Any) -> Any:
    names = "max_seqs num_running num_waiting num_paused blocks_total blocks_free steps preemptions prompt_tokens"
    names += " cached_tokens output_tokens prefix_lookups prefix_hits evictions"
    return SimpleNamespace(**{**dict.fromkeys(names.split(), 1), "speculation": None, **fields})


def _speculation() -> SpeculationCounts:
    return SpeculationCounts(
        drafted={"draft": 12, "ngram": 5},
        accepted={"draft": 7},
        accepted_by_position=[4, 2, 1],
        steps=5,
        tokens=12,
        draft_seconds=0.25,
        verify_seconds=1.5,
        timeouts=1,
        gamma={0: 3, 4: 2},
    )


def test_replicas_add_up_in_one_scrape():
    snapshots = [
        _http(200, 0.02).snapshot(),
        _http(200, 99.0).snapshot(),
        _http(400, 1e9).snapshot(),
        engine_snapshot(_engine(blocks_total=100, blocks_free=60, cached_tokens=5)),
        engine_snapshot(_engine(blocks_total=100, blocks_free=90, cached_tokens=6)),
    ]
    merged = merge_snapshots(pickle.loads(pickle.dumps(snapshots)))
    samples = _samples(render(merged))
    endpoint = ("endpoint", "/v1/completions")
    assert samples["sirocco_requests_total", (("code", "200"), endpoint)] == 2
    assert samples["sirocco_requests_total", (("code", "400"), endpoint)] == 1
    assert samples["sirocco_kv_blocks_used", ()] == 50
    assert samples["sirocco_kv_blocks_total", ()] == 200
    assert samples["sirocco_prefix_cache_hit_tokens_total", ()] == 11
    assert samples["sirocco_targets", ()] == 2
    first = "sirocco_time_to_first_token_seconds"
    assert samples[first + "_bucket", (("le", "0.01"),)] == 0
    assert samples[first + "_bucket", (("le", "0.025"),)] == 1
    assert samples[first + "_bucket", (("le", "300.0"),)] == 2
    assert samples[first + "_bucket", (("le", "+Inf"),)] == samples[first + "_count", ()] == 3
    assert samples["sirocco_inter_token_latency_seconds_count", ()] == 9
    assert abs(samples["sirocco_inter_token_latency_seconds_sum", ()] - 0.036) < 1e-9


def test_speculation_adds_up_over_the_engines_that_have_it():
    engines = [_engine(speculation=_speculation()), _engine(), _engine(speculation=_speculation())]
    samples = _samples(render(merge_snapshots(pickle.loads(pickle.dumps([engine_snapshot(e) for e in engines])))))
    found = {
        (name.removeprefix("sirocco_speculation_"), *(value for _, value in labels)): value
        for (name, labels), value in samples.items()
        if name.startswith("sirocco_speculation_")
    }
    assert found == {
        ("drafted_tokens_total", "draft"): 24,
        ("drafted_tokens_total", "ngram"): 10,
        ("accepted_tokens_total", "draft"): 14,
        ("accepted_by_position_total", "1"): 8,
        ("accepted_by_position_total", "2"): 4,
        ("accepted_by_position_total", "3"): 2,
        ("steps_total",): 10,
        ("tokens_total",): 24,
        ("draft_seconds_total",): 0.5,
        ("verify_seconds_total",): 3.0,
        ("timeouts_total",): 2,
        ("gamma_total", "0"): 6,
        ("gamma_total", "4"): 4,
    }


def test_an_engine_that_does_not_speculate_says_nothing_of_it():
    assert b"speculation" not in render(engine_snapshot(_engine()))
    before_it_counts = _samples(render(engine_snapshot(_engine(speculation=SpeculationCounts()))))
    assert before_it_counts["sirocco_speculation_steps_total", ()] == 0


def test_a_draft_and_the_way_to_it():
    parts = [
        draft_snapshot(DraftStats(forwards=5, evictions=2, blocks_total=40, blocks_free=30)),
        *(exchange_snapshot("exchange", [0, *[0] * (len(EXCHANGE_S) - 2), 1, 3], seconds) for seconds in (4.5, 6.0)),
    ]
    samples = _samples(render(merge_snapshots(pickle.loads(pickle.dumps(parts)))))
    found = {name.removeprefix("sirocco_draft_"): value for (name, _), value in samples.items() if "_draft_" in name}
    assert found == {"forwards_total": 5, "evictions_total": 2, "kv_blocks_used": 10, "kv_blocks_total": 40}
    name = "sirocco_speculation_exchange_seconds"
    assert samples[name + "_bucket", (("le", "0.5"),)] == 0
    assert samples[name + "_bucket", (("le", "1.0"),)] == 2
    assert samples[name + "_bucket", (("le", "+Inf"),)] == samples[name + "_count", ()] == 8
    assert samples[name + "_sum", ()] == 10.5


def test_merging_leaves_its_parts_alone():
    parts = [_http(200, 1).snapshot(), _http(200, 1).snapshot()]
    before = pickle.dumps(parts)
    merge_snapshots(parts)
    assert pickle.dumps(parts) == before


def test_a_snapshot_of_another_version_does_not_break_the_scrape():
    merged = merge_snapshots([{"sirocco_of_tomorrow": {"": [1.0]}}, engine_snapshot(_engine())])
    assert "sirocco_of_tomorrow" not in merged
    assert b"of_tomorrow" not in render(merged)


def test_every_metric_is_there_before_it_counts():
    text = render({}).decode()
    for name, description in METRICS.items():
        assert (f"# TYPE {name} {description.kind}" in text) != description.is_optional
        assert description.labels or (f"\n{name}" in text) != description.is_optional


async def test_all_snapshots_have_descriptions():
    process = process_snapshot("Target")
    names = {*HttpMetrics().snapshot(), *engine_snapshot(_engine(speculation=_speculation())), *process}
    names |= {
        *exchange_snapshot("exchange", [], 0.0),
        *exchange_snapshot("messaging", [], 0.0),
        *draft_snapshot(DraftStats(0, 0, 0, 0)),
    }
    # What is missing is what replicas say of their weights: tests/test_re_isq_app.py, tests/test_speculation_app.py.
    assert names == set(METRICS) - {"sirocco_isq_info", "sirocco_draft_isq_info"}
    assert process["sirocco_process_resident_bytes"]["Target"][0] > 2**20
    assert process["sirocco_event_loop_tasks"]["Target"] == [1.0]
