"""One decode step as the device saw it: how much of the time it was busy, and the longest times it was not."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.engine_speed import EngineUnderTest, Load

STEPS = 8


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel or copy on the device, in microseconds."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Gap:
    """The device waited for so many microseconds between two kernels."""

    before: str
    after: str
    us: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """busy_share: of the time from the first kernel's begin to the last one's end."""

    step_us: float
    busy_share: float
    kernels_per_step: float
    gaps: tuple[Gap, ...]


def profile_decode(tested: EngineUnderTest, load: Load, steps: int = STEPS) -> StepProfile:
    """Profiles some decode steps of an engine on a CUDA device."""
    tested.start(load, 2)
    for _ in range(4):
        tested.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            tested.step()
        torch.cuda.synchronize()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    ]
    tested.finish()
    return summary(spans, steps)


def summary(spans: Sequence[Span], steps: int, num_gaps: int = 5) -> StepProfile:
    """What the spans of some steps amount to; they may overlap."""
    assert spans, "the profiler saw no kernel"
    ordered = sorted(spans, key=lambda span: span.begin)
    busy, end, last = 0.0, ordered[0].begin, ordered[0].name
    gaps: list[Gap] = []
    for span in ordered:
        if span.begin > end:
            gaps.append(Gap(last, span.name, span.begin - end))
        busy += max(0.0, span.end - max(span.begin, end))
        if span.end >= end:
            end, last = span.end, span.name
    whole = end - ordered[0].begin
    longest = sorted(gaps, key=lambda gap: -gap.us)[:num_gaps]
    return StepProfile(whole / steps, busy / whole, len(spans) / steps, tuple(longest))
