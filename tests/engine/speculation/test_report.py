"""A line a minute, by a clock of the test's own."""

import asyncio
import logging

import pytest

from serve_app.engine.speculation import report
from serve_app.engine.speculation.report import SpeculationReport
from serve_app.engine.stats import SpeculationCounts


class Clock:
    """Sleeps end when the test says so."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self._turn = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._turn.clear()
        await self._turn.wait()

    async def go_on(self) -> None:
        """To the next sleep."""
        count = len(self.slept)
        self._turn.set()
        while len(self.slept) == count:
            await asyncio.sleep(0)


def counted(factor: int) -> SpeculationCounts:
    return SpeculationCounts(
        drafted={"draft": 300 * factor, "ngram": 100 * factor, "suffix": 0},
        accepted={"draft": 240 * factor, "ngram": 10 * factor, "suffix": 0},
        steps=100 * factor,
        tokens=350 * factor,
        draft_seconds=0.5 * factor,
        draft_waits=200 * factor,
        verify_seconds=1.2 * factor,
        verify_steps=100 * factor,
        timeouts=2 * factor,
    )


async def test_a_line_a_minute_where_something_was_drafted(caplog: pytest.LogCaptureFixture) -> None:
    clock, now = Clock(), counted(7)
    running = asyncio.create_task(SpeculationReport(lambda: now, clock.sleep).run())
    with caplog.at_level(logging.INFO, report.__name__):
        await asyncio.sleep(0)
        await clock.go_on()
        assert not caplog.messages
        now = counted(8)
        await clock.go_on()
        assert caplog.messages == [
            "speculation in the last 60 s: 400 tokens drafted, 62% accepted (draft 240 of 300, ngram 10 of 100), "
            "3.50 tokens a verified proposal, draft 2.5 ms, verify 12.0 ms in the mean, 2 timeouts"
        ]
        await clock.go_on()
        # A draft that is away, and asked in vain: nothing was drafted.
        now.timeouts += 5
        await clock.go_on()
        assert len(caplog.messages) == 1
        now = counted(8)
        now.timeouts += 5
        now.drafted["draft"] += 5
        now.steps += 2
        now.tokens += 2
        await clock.go_on()
        assert caplog.messages[1:] == [
            "speculation in the last 60 s: 5 tokens drafted, 0% accepted (draft 0 of 5), "
            "1.00 tokens a verified proposal, draft 0.0 ms, verify 0.0 ms in the mean, 0 timeouts"
        ]
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 2
    assert clock.slept == [60.0] * 6
    running.cancel()


async def test_nothing_of_an_engine_that_does_not_speculate(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    running = asyncio.create_task(SpeculationReport(lambda: None, clock.sleep).run())
    with caplog.at_level(logging.INFO, report.__name__):
        await asyncio.sleep(0)
        for _ in range(3):
            await clock.go_on()
    assert not caplog.messages
    running.cancel()
