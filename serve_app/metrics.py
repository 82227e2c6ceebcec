"""Every metric, named and described once, and how the counts of many replicas become one scrape.

A snapshot is plain data that crosses process borders: metric name -> label values joined by a comma -> numbers. A
counter or gauge has one number, a histogram one per bucket (not cumulative), then the sum. Snapshots add up number by
number.
"""

import asyncio
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

Snapshot = dict[str, dict[str, list[float]]]

_FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
EXCHANGE_S = (2e-5, 4e-5, 6e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
_DURATION_S = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


@dataclass(frozen=True, slots=True)
class Description:
    """A metric's kind, help text, label names and, for a histogram, the upper bounds of its buckets.

    is_optional: of something that not every server does, and left out of the scrape where none does it.
    """

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    is_optional: bool = False


_speculation = partial(Description, "counter", is_optional=True)
_draft = partial(Description, is_optional=True)

METRICS: dict[str, Description] = {
    "sirocco_requests_total": Description("counter", "HTTP requests, by route and status.", ("endpoint", "code")),
    "sirocco_requests_in_flight": Description("gauge", "HTTP requests that are being answered."),
    "sirocco_disconnects_total": Description("counter", "Requests whose client left before the end.", ("reason",)),
    "sirocco_time_to_first_token_seconds": Description(
        "histogram", "From the request's arrival to its first token.", bounds=_FIRST_TOKEN_S
    ),
    "sirocco_inter_token_latency_seconds": Description(
        "histogram", "Between two tokens of a request.", bounds=_INTER_TOKEN_S
    ),
    "sirocco_request_duration_seconds": Description(
        "histogram", "From a generation request's arrival to its end.", bounds=_DURATION_S
    ),
    "sirocco_prompt_tokens_total": Description("counter", "Tokens in: of admitted prompts, cached ones included."),
    "sirocco_output_tokens_total": Description("counter", "Tokens out."),
    "sirocco_requests_running": Description("gauge", "Requests in the batch."),
    "sirocco_requests_waiting": Description("gauge", "Requests that wait for a place in the batch."),
    "sirocco_requests_paused": Description("gauge", "Requests that wait for their client to read."),
    "sirocco_requests_capacity": Description("gauge", "Requests that may run at once."),
    "sirocco_kv_blocks_used": Description("gauge", "KV blocks held by requests."),
    "sirocco_kv_blocks_total": Description("gauge", "KV blocks there are."),
    "sirocco_prefix_cache_lookups_total": Description("counter", "Prompts looked up in the prefix cache."),
    "sirocco_prefix_cache_hits_total": Description("counter", "Prompts of which the prefix cache held a part."),
    "sirocco_prefix_cache_hit_tokens_total": Description("counter", "Prompt tokens taken from the prefix cache."),
    "sirocco_prefix_cache_evictions_total": Description("counter", "Cached blocks given to other requests."),
    "sirocco_preemptions_total": Description("counter", "Requests sent back to the queue for want of blocks."),
    "sirocco_engine_steps_total": Description("counter", "Steps of the engine: one forward pass each."),
    "sirocco_speculation_drafted_tokens_total": _speculation("Tokens that were proposed.", ("proposer",)),
    "sirocco_speculation_accepted_tokens_total": _speculation(
        "Proposed tokens that the target drew too.", ("proposer",)
    ),
    "sirocco_speculation_accepted_by_position_total": _speculation(
        "The same, by place in the proposal, from 1.", ("position",)
    ),
    "sirocco_speculation_steps_total": _speculation("Proposals verified: one request in one step each."),
    "sirocco_speculation_tokens_total": _speculation("Tokens out of verified proposals, the target's own too."),
    "sirocco_speculation_draft_seconds_total": _speculation("Time that steps waited for proposals."),
    "sirocco_speculation_verify_seconds_total": _speculation("Time of forwards that verified proposals."),
    "sirocco_speculation_timeouts_total": _speculation("Steps that gave up waiting for the draft model."),
    "sirocco_speculation_gamma_total": _speculation(
        "Choices of how many tokens to propose for a request in a step, where there was a proposer.", ("gamma",)
    ),
    "sirocco_speculation_exchange_seconds": Description(
        "histogram",
        "From a target's question to the draft model's answer, where it came in time.",
        bounds=EXCHANGE_S,
        is_optional=True,
    ),
    "sirocco_speculation_messaging_seconds": Description(
        "histogram",
        "The same without the time that the draft model worked on it: what the way costs.",
        bounds=EXCHANGE_S,
        is_optional=True,
    ),
    "sirocco_draft_forwards_total": _draft("counter", "Forward passes of the draft model."),
    "sirocco_draft_evictions_total": _draft("counter", "Texts whose KV blocks the draft model gave to others."),
    "sirocco_draft_kv_blocks_used": _draft("gauge", "The draft model's KV blocks that texts hold."),
    "sirocco_draft_kv_blocks_total": _draft("gauge", "The draft model's KV blocks there are."),
    "sirocco_draft_isq_info": _draft("gauge", "Draft replicas by the type of their weights.", ("isq_type",)),
    "sirocco_process_resident_bytes": Description("gauge", "Resident memory, by kind of replica.", ("replica",)),
    "sirocco_process_open_fds": Description("gauge", "Open files and sockets, by kind of replica.", ("replica",)),
    "sirocco_event_loop_tasks": Description("gauge", "Tasks of the event loops, by kind of replica.", ("replica",)),
    "sirocco_isq_info": Description("gauge", "Target replicas by the type of their weights.", ("isq_type",)),
    "sirocco_re_isq_jobs_total": Description("counter", "Changes of that type while serving, by outcome.", ("state",)),
    "sirocco_targets": Description("gauge", "Target replicas that were counted in this scrape."),
}


class SpeculationCounts(Protocol):
    """What an engine that speculates counts since it started.

    drafted, accepted: tokens, by proposer. accepted_by_position: tokens, by place in the proposal, from 0.
    steps: proposals verified; tokens: what came out of them. gamma: how often a request was to get so many tokens.
    """

    @property
    def drafted(self) -> Mapping[str, int]: ...
    @property
    def accepted(self) -> Mapping[str, int]: ...
    @property
    def accepted_by_position(self) -> Sequence[int]: ...
    @property
    def steps(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def draft_seconds(self) -> float: ...
    @property
    def verify_seconds(self) -> float: ...
    @property
    def timeouts(self) -> int: ...
    @property
    def gamma(self) -> Mapping[int, int]: ...


class DraftCounts(Protocol):
    """What is read of engine.stats.DraftStats."""

    @property
    def forwards(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def blocks_total(self) -> int: ...
    @property
    def blocks_free(self) -> int: ...


class EngineCounts(Protocol):
    """What is read of engine.stats.EngineStats."""

    @property
    def max_seqs(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_paused(self) -> int: ...
    @property
    def blocks_total(self) -> int: ...
    @property
    def blocks_free(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def prefix_lookups(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def speculation(self) -> SpeculationCounts | None: ...


class Histogram:
    """Counts per bucket and the sum. Not thread-safe: one event loop owns it."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    def numbers(self) -> list[float]:
        return [*map(float, self.counts), self.total]


class HttpMetrics:
    """What one ingress process counts. For use from its event loop only."""

    def __init__(self) -> None:
        self.requests: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.disconnects: defaultdict[str, int] = defaultdict(int)
        self.isq_jobs: defaultdict[str, int] = defaultdict(int)
        self.in_flight = 0
        self.first_token = Histogram(_FIRST_TOKEN_S)
        self.inter_token = Histogram(_INTER_TOKEN_S)
        self.duration = Histogram(_DURATION_S)

    def snapshot(self) -> Snapshot:
        requests = {f"{endpoint},{code}": [float(count)] for (endpoint, code), count in self.requests.items()}
        return {
            "sirocco_requests_total": requests,
            "sirocco_requests_in_flight": {"": [float(self.in_flight)]},
            "sirocco_disconnects_total": {reason: [float(count)] for reason, count in self.disconnects.items()},
            "sirocco_re_isq_jobs_total": {state: [float(count)] for state, count in self.isq_jobs.items()},
            "sirocco_time_to_first_token_seconds": {"": self.first_token.numbers()},
            "sirocco_inter_token_latency_seconds": {"": self.inter_token.numbers()},
            "sirocco_request_duration_seconds": {"": self.duration.numbers()},
        }


def engine_snapshot(stats: EngineCounts) -> Snapshot:
    """One engine's counters and state."""
    values = {
        "sirocco_prompt_tokens_total": stats.prompt_tokens,
        "sirocco_output_tokens_total": stats.output_tokens,
        "sirocco_requests_running": stats.num_running,
        "sirocco_requests_waiting": stats.num_waiting,
        "sirocco_requests_paused": stats.num_paused,
        "sirocco_requests_capacity": stats.max_seqs,
        "sirocco_kv_blocks_used": stats.blocks_total - stats.blocks_free,
        "sirocco_kv_blocks_total": stats.blocks_total,
        "sirocco_prefix_cache_lookups_total": stats.prefix_lookups,
        "sirocco_prefix_cache_hits_total": stats.prefix_hits,
        "sirocco_prefix_cache_hit_tokens_total": stats.cached_tokens,
        "sirocco_prefix_cache_evictions_total": stats.evictions,
        "sirocco_preemptions_total": stats.preemptions,
        "sirocco_engine_steps_total": stats.steps,
        "sirocco_targets": 1,
    }
    snapshot = {name: {"": [float(value)]} for name, value in values.items()}
    return snapshot if stats.speculation is None else snapshot | _speculation_snapshot(stats.speculation)


def _speculation_snapshot(counts: SpeculationCounts) -> Snapshot:
    values = {
        "steps": counts.steps,
        "tokens": counts.tokens,
        "draft_seconds": counts.draft_seconds,
        "verify_seconds": counts.verify_seconds,
        "timeouts": counts.timeouts,
    }
    by_label: dict[str, Mapping[Any, int]] = {
        "drafted_tokens": counts.drafted,
        "accepted_tokens": counts.accepted,
        "accepted_by_position": dict(enumerate(counts.accepted_by_position, 1)),
        "gamma": counts.gamma,
    }
    snapshot = {name: {"": [float(value)]} for name, value in values.items()}
    snapshot |= {name: {str(label): [float(n)] for label, n in numbers.items()} for name, numbers in by_label.items()}
    return {f"sirocco_speculation_{name}_total": series for name, series in snapshot.items()}


def exchange_snapshot(name: Literal["exchange", "messaging"], counts: Sequence[int], seconds: float) -> Snapshot:
    """Exchanges with a draft model: how many by EXCHANGE_S, and their sum."""
    return {f"sirocco_speculation_{name}_seconds": {"": [*map(float, counts), seconds]}}


def draft_snapshot(stats: DraftCounts) -> Snapshot:
    """A draft model's counters and state."""
    values = {
        "forwards_total": stats.forwards,
        "evictions_total": stats.evictions,
        "kv_blocks_used": stats.blocks_total - stats.blocks_free,
        "kv_blocks_total": stats.blocks_total,
    }
    return {f"sirocco_draft_{name}": {"": [float(value)]} for name, value in values.items()}


def process_snapshot(replica: str) -> Snapshot:
    """This process, for a replica of the given kind. For use from its event loop."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    values = {
        "sirocco_process_resident_bytes": resident_pages * os.sysconf("SC_PAGE_SIZE"),
        "sirocco_process_open_fds": len(os.listdir("/proc/self/fd")),
        "sirocco_event_loop_tasks": len(asyncio.all_tasks()),
    }
    return {name: {replica: [float(value)]} for name, value in values.items()}


def merge_snapshots(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum of the snapshots. One of another version may lack metrics or have unknown ones: those are left out."""
    merged: Snapshot = {}
    for snapshot in snapshots:
        for name, series in snapshot.items():
            if name not in METRICS:
                continue
            sums = merged.setdefault(name, {})
            for labels, numbers in series.items():
                old = sums.get(labels)
                sums[labels] = list(numbers) if old is None else [a + b for a, b in zip(old, numbers, strict=False)]
    return merged


def render(snapshot: Snapshot) -> bytes:
    """The snapshot in Prometheus' text format; metrics without a count yet appear with 0 where they have no labels."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(snapshot))
    return generate_latest(registry)


class _Collector:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for name, description in METRICS.items():
            if description.is_optional and name not in self._snapshot:
                continue
            empty = {} if description.labels else {"": [0.0] * (len(description.bounds) + 2)}
            yield _family(name, description, self._snapshot.get(name) or empty)

    def describe(self) -> list[Metric]:
        return []


def _family(name: str, description: Description, series: dict[str, list[float]]) -> Metric:
    labels = description.labels
    if description.kind == "histogram":
        histogram = HistogramMetricFamily(name, description.help, labels=labels)
        for key, numbers in series.items():
            histogram.add_metric(_label_values(key), _cumulative(description.bounds, numbers), sum_value=numbers[-1])
        return histogram
    family_class = CounterMetricFamily if description.kind == "counter" else GaugeMetricFamily
    family = family_class(name, description.help, labels=labels)
    for key, numbers in series.items():
        family.add_metric(_label_values(key), numbers[0])
    return family


def _label_values(key: str) -> list[str]:
    return key.split(",") if key else []


def _cumulative(bounds: tuple[float, ...], numbers: list[float]) -> list[tuple[str, float]]:
    running = 0.0
    buckets = []
    for bound, count in zip([*map(str, bounds), "+Inf"], numbers, strict=False):
        running += count
        buckets.append((bound, running))
    return buckets
