"""What speculation brought lately, as a line in the log. No torch."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator

from serve_app.engine.stats import SpeculationCounts

log = logging.getLogger(__name__)

PERIOD_S = 60.0


class SpeculationReport:
    """Says once in PERIOD_S what the counts of an engine have grown by; nothing where no token was drafted."""

    def __init__(
        self,
        counts: Callable[[], SpeculationCounts | None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """counts: a copy of them, None where nothing is proposed. sleep: for so many seconds."""
        self._counts = counts
        self._sleep = sleep

    async def run(self) -> None:
        """Until it is cancelled."""
        before = self._counts() or SpeculationCounts()
        while True:
            await self._sleep(PERIOD_S)
            now = self._counts() or SpeculationCounts()
            line = sentence(before, now)
            if line:
                log.info("%s", line)
            before = now


def sentence(before: SpeculationCounts, now: SpeculationCounts) -> str:
    """What lies between two counts; "" where no token was drafted."""
    drafted = sum(now.drafted.values()) - sum(before.drafted.values())
    if not drafted:
        return ""
    accepted = sum(now.accepted.values()) - sum(before.accepted.values())
    parts = [
        f"speculation in the last {PERIOD_S:g} s: {drafted} tokens drafted",
        f"{accepted / drafted:.0%} accepted ({', '.join(_by_proposer(before, now))})",
        f"{_mean(now.tokens - before.tokens, now.steps - before.steps):.2f} tokens a verified proposal",
        f"draft {1e3 * _mean(now.draft_seconds - before.draft_seconds, now.draft_waits - before.draft_waits):.1f} ms",
        f"verify {1e3 * _mean(now.verify_seconds - before.verify_seconds, now.verify_steps - before.verify_steps):.1f} "
        "ms in the mean",
        f"{now.timeouts - before.timeouts} timeouts",
    ]
    return ", ".join(parts)


def _by_proposer(before: SpeculationCounts, now: SpeculationCounts) -> Iterator[str]:
    for name, total in now.drafted.items():
        drafted = total - before.drafted.get(name, 0)
        if drafted:
            accepted = now.accepted.get(name, 0) - before.accepted.get(name, 0)
            yield f"{name} {accepted} of {drafted}"


def _mean(total: float, count: int) -> float:
    return total / count if count else 0.0
