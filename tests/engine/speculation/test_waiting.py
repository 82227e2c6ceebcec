"""Waiting for another process, asleep or looking."""

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from serve_app.engine.speculation.waiting import MAILBOX_BYTES, Mailbox, Waiting, mailbox_memory


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture(params=[True, False], ids=["looks", "sleeps"])
def waiting(request: pytest.FixtureRequest) -> Waiting:
    return Waiting(spins=request.param)


@pytest.mark.parametrize("spin_s", [0.0, 0.005, 1.0])
def test_nothing_comes(waiting: Waiting, pipe: tuple[int, int], spin_s: float) -> None:
    waiting.add(pipe[0])
    began_s = time.monotonic()
    assert waiting.wait(0.02, spin_s) == []
    assert 0.02 <= time.monotonic() - began_s < 0.5
    assert waiting.wait(0.0, spin_s) == waiting.wait(-1.0, spin_s) == []


@pytest.mark.parametrize(("timeout_s", "spin_s"), [(None, 0.0), (None, 5.0), (5.0, 0.0), (5.0, 5.0), (5.0, 0.001)])
def test_what_comes_while_it_waits(
    waiting: Waiting, pipe: tuple[int, int], timeout_s: float | None, spin_s: float
) -> None:
    """Other threads of Python's work meanwhile: it is one of them that writes."""
    silent = os.pipe()

    def write() -> None:
        # Later than the reader begins to wait.
        time.sleep(0.01)
        os.write(pipe[1], b"1")

    waiting.add(silent[0])
    waiting.add(pipe[0])
    writer = threading.Thread(target=write)
    writer.start()
    assert waiting.wait(timeout_s, spin_s) == [pipe[0]]
    writer.join()
    # It stays readable until somebody reads.
    assert waiting.wait(timeout_s, spin_s) == [pipe[0]]
    waiting.remove(pipe[0])
    assert waiting.wait(0.0, spin_s) == []
    for end in silent:
        os.close(end)


def test_the_others_end_is_closed(waiting: Waiting) -> None:
    ours, theirs = os.pipe()
    waiting.add(ours)
    os.close(theirs)
    assert waiting.wait(None) == [ours]
    os.close(ours)


def test_without_native_code_nobody_looks_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import dispatch

    monkeypatch.setenv("SIROCCO_NATIVE", "0")
    dispatch.native.cache_clear()
    try:
        waiting, memory = Waiting(spins=True), mailbox_memory()
        assert not waiting.spins
        assert waiting.open_mailbox(memory, memory, is_first=True) is None
        os.close(memory)
    finally:
        monkeypatch.undo()
        dispatch.native.cache_clear()
    assert Waiting(spins=True).spins


class Ends:
    """Both ends of a mailbox in one process, and of a way of packets."""

    def __init__(self) -> None:
        self.memory = mailbox_memory()
        self.sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.waiting = Waiting(spins=True), Waiting(spins=True)
        for waiting, one in zip(self.waiting, self.sockets, strict=True):
            waiting.add(one.fileno())
        self.mailboxes = self._open(0), self._open(1)

    def _open(self, number: int) -> Mailbox:
        mailbox = self.waiting[number].open_mailbox(self.memory, self.sockets[number].fileno(), is_first=not number)
        assert mailbox is not None
        return mailbox

    def close(self) -> None:
        os.close(self.memory)
        for one in self.sockets:
            one.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


@pytest.mark.parametrize("writer", [0, 1])
def test_messages_through_a_mailbox(ends: Ends, writer: int) -> None:
    out, into = ends.mailboxes[writer], ends.mailboxes[1 - writer]
    waiting, descriptor = ends.waiting[1 - writer], ends.sockets[1 - writer].fileno()
    for i, size in enumerate([0, 1, 1000, MAILBOX_BYTES] * 3):
        message = bytes([i]) * size
        assert waiting.wait(0.0) == []
        assert into.take(0) is None
        assert not out.post(message, 0)
        assert waiting.wait(None) == [descriptor]
        assert into.take(0) == message
        assert into.take(0) is None
    # Both ways are apart, and so are packets.
    ends.sockets[writer].send(b"1")
    out.post(b"2", 0)
    assert waiting.wait(None) == [descriptor]
    into.post(b"3", 0)
    assert (into.take(0), out.take(0)) == (b"2", b"3")


def test_a_message_does_not_overtake_packets(ends: Ends) -> None:
    out, into = ends.mailboxes
    for after in (1, 2**31, 2**32, 2**40):
        out.post(b"1", after)
        assert into.take(after - 1) is None
        assert into.take(after + 1) == b"1"


def test_who_sleeps_is_to_be_woken(ends: Ends) -> None:
    out, into = ends.mailboxes
    found: list[list[int]] = []
    reader = threading.Thread(target=lambda: found.append(ends.waiting[1].wait(10.0, 0.005)))
    reader.start()
    # Far longer than it looks; that a thread sleeps cannot be seen from here.
    time.sleep(0.2)
    assert out.post(b"1", 0)
    ends.sockets[0].send(b"ring")
    reader.join()
    assert found == [[ends.sockets[1].fileno()]]
    assert into.take(0) == b"1"
    # It is awake.
    assert not out.post(b"2", 0)


def test_no_message_is_missed(ends: Ends) -> None:
    """While one end falls asleep again and again."""
    count = 3000

    def answer() -> None:
        for i in range(count):
            while (question := ends.mailboxes[1].take(0)) is None:
                ends.waiting[1].wait(10.0, (i % 7) * 1e-5)
                with contextlib.suppress(BlockingIOError):
                    ends.sockets[1].recv(10, socket.MSG_DONTWAIT)
            ends.mailboxes[1].post(question[::-1], 0)

    thread = threading.Thread(target=answer)
    thread.start()
    began_s = time.monotonic()
    for i in range(count):
        message = b"%d" % i
        if ends.mailboxes[0].post(message, 0):
            ends.sockets[0].send(b"ring")
        while (answered := ends.mailboxes[0].take(0)) is None:
            ends.waiting[0].wait(1.0, 1.0)
            assert time.monotonic() - began_s < 30
        assert answered == message[::-1]
        # So that the next message meets the reader at every point of falling asleep.
        time.sleep((i % 5) * 1e-5)
    thread.join()


def test_a_mailbox_has_its_limits(ends: Ends) -> None:
    with pytest.raises(ValueError, match="too long"):
        ends.mailboxes[0].post(bytes(MAILBOX_BYTES + 4097), 0)
    # One end that writes what it must not is noticed at the other.
    ends.mailboxes[0].post(b"12345", 0)
    with open(f"/proc/self/fd/{ends.memory}", "r+b") as file:
        content = file.read()
        file.seek(content.index(b"12345") - 12)
        file.write((2**31).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="not filled as it should be"):
        ends.mailboxes[1].take(0)


def test_the_other_end_may_not_be_open(ends: Ends) -> None:
    waiting = Waiting(spins=True)
    memory = mailbox_memory()
    first = waiting.open_mailbox(memory, 0, is_first=True)
    assert first is not None
    assert not first.has_reader
    second = Waiting(spins=True).open_mailbox(memory, 0, is_first=False)
    assert second is not None
    assert first.has_reader
    assert second.has_reader
    os.close(memory)


def test_memory_that_is_none_for_mailboxes() -> None:
    waiting = Waiting(spins=True)
    memory = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 10 * MAILBOX_BYTES)
    # It could shrink while somebody reads there.
    with pytest.raises(OSError, match="no memory of a mailbox"):
        waiting.open_mailbox(memory, 0, is_first=True)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(OSError, match="no memory of a mailbox"):
        waiting.open_mailbox(memory, 0, is_first=True)
    os.close(memory)
    pipe = os.pipe()
    with pytest.raises(OSError, match="Invalid argument"):
        waiting.open_mailbox(pipe[0], 0, is_first=True)
    for end in pipe:
        os.close(end)
