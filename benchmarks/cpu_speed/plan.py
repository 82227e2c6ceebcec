"""The run itself: engines in turn, round by round, within the memory that there is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from benchmarks.cpu_speed.cells import Cell, Sample
from benchmarks.cpu_speed.engine import Engine, EngineError

RESERVE_BYTES = 2 << 30


@dataclass(slots=True)
class Results:
    """samples: by cell and engine, then by round. bandwidth: bytes a second, one a round. errors: by engine."""

    samples: dict[tuple[Cell, str], dict[int, Sample]] = field(default_factory=dict)
    bandwidth: dict[Cell, list[float]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)

    def of(self, cell: Cell, name: str) -> list[Sample]:
        """An engine's samples of a cell."""
        return list(self.samples.get((cell, name), {}).values())

    def pairs(self, cell: Cell, ours: str, theirs: str) -> list[tuple[Sample, Sample]]:
        """Samples of the same round, where both have one."""
        a, b = self.samples.get((cell, ours), {}), self.samples.get((cell, theirs), {})
        return [(a[number], b[number]) for number in a if number in b]


def run_rounds(
    engines: Sequence[Engine],
    cells: Sequence[Cell],
    rounds: int,
    bandwidth: Callable[[], float],
    say: Callable[[str], None],
    free_bytes: Callable[[], int] = lambda: psutil.virtual_memory().available,
) -> Results:
    """Every cell `rounds` times by every engine that has it; who begins changes from round to round.

    The rounds of one cell follow each other, and bandwidth() is measured within each, so that what is compared lies
    close in time. An engine that fails in a cell is left out of the rest of that cell.
    """
    results = Results()
    for cell in cells:
        running = [engine for engine in engines if engine.can(cell)]
        for number in range(rounds):
            shift = number % max(1, len(running))
            for engine in running[shift:] + running[:shift]:
                try:
                    if not engine.is_loaded:
                        make_room(engine, engines, free_bytes)
                    sample = engine.measure(cell, number)
                except EngineError as error:
                    results.errors.setdefault(engine.name, []).append(f"{cell.label}: {error}")
                    say(f"{cell.label:16} {error}")
                    running = [other for other in running if other is not engine]
                    continue
                results.samples.setdefault((cell, engine.name), {})[number] = sample
                say(f"{cell.label:16} round {number + 1}/{rounds} {engine.name:14} {sample.rate:9.2f} tok/s")
            results.bandwidth.setdefault(cell, []).append(bandwidth())
    return results


def make_room(engine: Engine, engines: Sequence[Engine], free_bytes: Callable[[], int]) -> None:
    """Stops other engines, the largest first, until this one fits; they start again in their turn."""
    others = sorted((e for e in engines if e.is_loaded and e is not engine), key=lambda e: -e.needed_bytes)
    for other in others:
        if free_bytes() >= engine.needed_bytes + RESERVE_BYTES:
            return
        other.stop()
    if free_bytes() < engine.needed_bytes + RESERVE_BYTES:
        raise EngineError(
            f"{engine.name}: needs {engine.needed_bytes / 2**30:.1f} GiB and {RESERVE_BYTES / 2**30:.0f} to spare, "
            f"{free_bytes() / 2**30:.1f} GiB are free"
        )
