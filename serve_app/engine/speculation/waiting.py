"""Waiting for a message of another process: woken by it, or sooner, by looking again and again on a core to spare."""

import fcntl
import math
import os
import select
from typing import Protocol

LOOK_S = 4e-3
"""For so long somebody who waits thinks of nothing else: other threads on this core would hear later of what comes."""
MOST_SPIN_S = 0.05
"""Longer than a step of most targets: whoever waits so long is not being asked all the time, and may sleep."""
MAILBOX_BYTES = 1 << 17
"""The longest message that a mailbox takes."""
# With room for what stands before a message.
_MEMORY_BYTES = 2 * (MAILBOX_BYTES + 4096)


class Mailbox(Protocol):
    """One end of memory that two processes share: the newest message each way, for whoever looks there in time."""

    @property
    def descriptor(self) -> int:
        """The way of packets that it belongs to."""

    @property
    def has_reader(self) -> bool:
        """Whether the other end is open."""

    def post(self, message: bytes, after: int) -> bool:
        """Puts a message there; the last one was taken. Returns whether its reader sleeps, and has to be woken by a
        packet. after: packets before it. Raises ValueError for more than MAILBOX_BYTES."""

    def take(self, after: int) -> bytes | None:
        """A message, once; None: there is none, or more than the first `after` packets precede it. Raises ValueError
        where the other end has not kept to that."""


def mailbox_memory() -> int:
    """A descriptor of memory for both ends. Raises OSError."""
    memory = os.memfd_create("sirocco-mailbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, _MEMORY_BYTES)
        # Who reads there must not find it gone.
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        os.close(memory)
        raise
    return memory


class Waiting:
    """Waits until any of some descriptors, or their mailboxes, can be read.

    spins: whether this process has a core for that. Without the native module nobody does: an interpreter that looks
    again and again keeps its other threads from working.
    """

    def __init__(self, *, spins: bool = False) -> None:
        self._descriptors: list[int] = []
        self._mailboxes: list[Mailbox] = []
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
        self._mailboxes = [mailbox for mailbox in self._mailboxes if mailbox.descriptor != descriptor]
        self._poll.unregister(descriptor)

    def open_mailbox(self, memory: int, descriptor: int, *, is_first: bool) -> Mailbox | None:
        """What comes there is waited for as what comes by a descriptor that was added; None where nobody spins.
        memory: of mailbox_memory(), to be closed by the caller. Raises OSError for memory that is none of it."""
        if self._native is None:
            return None
        is_sealed = fcntl.fcntl(memory, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        if not is_sealed or os.fstat(memory).st_size != _MEMORY_BYTES:
            raise OSError("no memory of a mailbox")
        mailbox: Mailbox = self._native.Mailbox(memory, descriptor, is_first)
        self._mailboxes.append(mailbox)
        return mailbox

    def wait(self, timeout_s: float | None, spin_s: float = MOST_SPIN_S) -> list[int]:
        """Which can be read, as soon as any can, [] after timeout_s; None: no limit. Looks for spin_s, then sleeps."""
        if self._native is None:
            return self._sleep(None if timeout_s is None else max(0, math.ceil(timeout_s * 1000)))
        timeout_ns = -1 if timeout_s is None else max(0, int(timeout_s * 1e9))
        spin_ns = max(0, int(spin_s * 1e9))
        ready: list[int] = self._native.wait_readable(self._descriptors, self._mailboxes, spin_ns, timeout_ns)
        return ready

    def _sleep(self, timeout_ms: int | None) -> list[int]:
        return [descriptor for descriptor, _ in self._poll.poll(timeout_ms)]
