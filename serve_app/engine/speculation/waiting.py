"""Waiting for a message of another process: woken by it, or sooner, by looking again and again on a core to spare."""

import math
import select

LOOK_S = 60e-6
"""An answer that comes so soon is there before this process could have done anything else."""
MOST_SPIN_S = 0.05
"""Longer than a step of most targets: whoever waits so long is not being asked all the time, and may sleep."""


class Waiting:
    """Waits until any of some descriptors can be read.

    spins: whether this process has a core for that. Without the native module nobody does: an interpreter that looks
    again and again keeps its other threads from working.
    """

    def __init__(self, *, spins: bool = False) -> None:
        self._descriptors: list[int] = []
        self._poll = select.poll()
        self._native = None
        if spins:
            # Imported here: torch comes with it, which this process has in any case.
            from kernels.dispatch import native

            ops = native().ops
            self._native = None if ops is None else ops._native

    @property
    def spins(self) -> bool:
        """Whether it looks again and again."""
        return self._native is not None

    def add(self, descriptor: int) -> None:
        """One more to wait for."""
        self._descriptors.append(descriptor)
        self._poll.register(descriptor, select.POLLIN)

    def remove(self, descriptor: int) -> None:
        """One that was added is not waited for any more; before it is closed."""
        self._descriptors.remove(descriptor)
        self._poll.unregister(descriptor)

    def look(self) -> list[int]:
        """Which can be read, as soon as any can, [] after LOOK_S; meanwhile no other thread of Python's works. Where
        nobody spins: which can be read now."""
        if self._native is None:
            return self._sleep(0)
        nanoseconds = int(LOOK_S * 1e9)
        ready: list[int] = self._native.wait_readable(self._descriptors, nanoseconds, nanoseconds, True)
        return ready

    def wait(self, timeout_s: float | None, spin_s: float = MOST_SPIN_S) -> list[int]:
        """Which can be read, as soon as any can, [] after timeout_s; None: no limit. Looks for spin_s, then sleeps."""
        if self._native is None:
            return self._sleep(None if timeout_s is None else max(0, math.ceil(timeout_s * 1000)))
        timeout_ns = -1 if timeout_s is None else max(0, int(timeout_s * 1e9))
        ready: list[int] = self._native.wait_readable(self._descriptors, max(0, int(spin_s * 1e9)), timeout_ns, False)
        return ready

    def _sleep(self, timeout_ms: int | None) -> list[int]:
        return [descriptor for descriptor, _ in self._poll.poll(timeout_ms)]
