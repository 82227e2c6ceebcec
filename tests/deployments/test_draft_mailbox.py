"""Calls and answers through memory that target and draft share, each end against the other one played by hand."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deployments.draft_channel import DraftThread
from deployments.draft_link import ChannelLink
from deployments.draft_messages import (
    Answer,
    Answers,
    Call,
    Calls,
    Feed,
    OfferMailbox,
    Ring,
    pack,
    read_by_draft,
    read_by_target,
)
from serve_app.engine.speculation.draft_call import Drafted
from serve_app.engine.speculation.proposer import DraftWish, no_work
from serve_app.engine.speculation.waiting import MOST_SPIN_S, Mailbox, Waiting, mailbox_memory
from tests.deployments.draft_process import CountingModel, expected


class HandDraft:
    """The draft's end of a channel with a mailbox, by hand."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen()
        self.link = ChannelLink(path, spins=True)
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(5)
        self.offer, [self.memory], *_ = socket.recv_fds(self.connection, 100, 1)
        self.waiting = Waiting(spins=True)
        self.waiting.add(self.connection.fileno())

    def open_mailbox(self) -> Mailbox:
        mailbox = self.waiting.open_mailbox(self.memory, self.connection.fileno(), is_first=False)
        assert mailbox is not None
        return mailbox

    async def ask(self, text: list[int], meanwhile: Callable[[], None] = no_work) -> list[Drafted] | None:
        """As the target's engine would."""
        return await asyncio.to_thread(self.link.ask, [DraftWish(3, text, 1, 4)], time.monotonic() + 5, meanwhile)

    def close(self) -> None:
        os.close(self.memory)
        for end in (self.connection, self._listener, self.link):
            end.close()


@pytest.fixture
def draft(tmp_path: Path) -> Iterator[HandDraft]:
    draft = HandDraft(str(tmp_path / "socket"))
    yield draft
    draft.close()


def epoch_of(message: bytes) -> int:
    calls = read_by_draft(message)
    assert isinstance(calls, Calls)
    return calls.epoch


async def test_calls_go_through_the_mailbox_once_it_is_open(draft: HandDraft) -> None:
    assert isinstance(read_by_draft(draft.offer), OfferMailbox)
    # Not yet: a draft without a core to spare looks at packets alone.
    asked = asyncio.create_task(draft.ask([1, 2]))
    epoch = epoch_of(await asyncio.to_thread(draft.connection.recv, 1 << 17))
    draft.connection.send(pack(Answers(epoch, 0.0, [Answer(3, 2, [8])])))
    assert await asked == [[8]]
    mailbox = draft.open_mailbox()
    for length in (3, 4):
        asked = asyncio.create_task(draft.ask(list(range(length))))
        while (calls := mailbox.take(2)) is None:
            await asyncio.sleep(0.001)
        # One that is late is dropped, and so is a ring that was for nothing.
        draft.connection.send(pack(Ring()))
        draft.connection.send(pack(Answers(epoch_of(calls) - 1, 0.0, [Answer(3, length, [7])])))
        assert not mailbox.post(pack(Answers(epoch_of(calls), 0.0, [Answer(3, length, [9])])), 0)
        assert await asked == [[9]]


async def test_one_who_sleeps_is_woken(draft: HandDraft) -> None:
    mailbox = draft.open_mailbox()
    sleeping = asyncio.create_task(asyncio.to_thread(draft.waiting.wait, 5.0, 0.0))
    # A thread that began to sleep cannot be seen from here.
    await asyncio.sleep(0.2)
    asked = asyncio.create_task(draft.ask([1, 2]))
    assert await sleeping == [draft.connection.fileno()]
    assert isinstance(read_by_draft(draft.connection.recv(100)), Ring)
    calls = mailbox.take(1)
    assert calls is not None
    # Longer than the target looks: it sleeps, too.
    await asyncio.sleep(4 * MOST_SPIN_S)
    assert mailbox.post(pack(Answers(epoch_of(calls), 0.0, [Answer(3, 2, [9])])), 0)
    draft.connection.send(pack(Ring()))
    assert await asked == [[9]]


async def test_an_answer_that_comes_at_once_is_waited_for_alone(draft: HandDraft) -> None:
    mailbox = draft.open_mailbox()
    done: list[str] = []
    # Of the first epoch: there before anybody has asked.
    mailbox.post(pack(Answers(1, 0.0, [Answer(3, 2, [9])])), 0)
    assert await draft.ask([1, 2], lambda: done.append("meanwhile")) == [[9]]
    assert done == []

    def answer() -> None:
        done.append("meanwhile")
        mailbox.post(pack(Answers(2, 0.0, [Answer(3, 3, [8])])), 0)

    # This one does not come before everything else is done.
    assert await draft.ask([1, 2, 3], answer) == [[8]]
    assert done == ["meanwhile"]


class HandTarget:
    """The target's end of a channel to a real draft, by hand."""

    def __init__(self, *, spins: bool = True, memory: int | None = None) -> None:
        self.draft = DraftThread(CountingModel(), spins=spins)
        self.draft.start()
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect(self.draft.path)
        self.connection.settimeout(5)
        self.waiting = Waiting(spins=True)
        self.waiting.add(self.connection.fileno())
        good = mailbox_memory()
        mailbox = self.waiting.open_mailbox(good, self.connection.fileno(), is_first=True)
        assert mailbox is not None
        self.mailbox: Mailbox = mailbox
        socket.send_fds(self.connection, [pack(OfferMailbox())], [good if memory is None else memory])
        os.close(good)

    def until_open(self) -> None:
        end_s = time.monotonic() + 5
        while not self.mailbox.has_reader:
            assert time.monotonic() < end_s
            time.sleep(0.001)

    def post(self, message: bytes, after: int) -> bool:
        """Wakes a draft that sleeps; whether that was needed."""
        sleeps = self.mailbox.post(message, after)
        if sleeps:
            self.connection.send(pack(Ring()))
        return sleeps

    def answered(self) -> Answers:
        """In the mailbox, and nowhere else."""
        assert self.waiting.wait(5.0) == [self.connection.fileno()]
        message = self.mailbox.take(0)
        assert message is not None
        found = read_by_target(message)
        assert isinstance(found, Answers)
        return found

    def close(self) -> None:
        self.connection.close()
        self.draft.stop()


@pytest.fixture
def target() -> Iterator[HandTarget]:
    target = HandTarget()
    yield target
    target.close()


def calls(epoch: int, base: int, token_ids: list[int]) -> bytes:
    return pack(Calls(epoch, 1.0, time.monotonic(), [Call(7, base, token_ids, 4, None)]))


def test_a_draft_answers_in_the_mailbox_what_came_there(target: HandTarget) -> None:
    target.until_open()
    # The call waits for the packet before it.
    target.connection.send(pack(Feed(7, 0, [1, 2, 3])))
    target.post(calls(1, 3, [4]), 2)
    found = target.answered()
    assert (found.epoch, found.answers) == (1, [Answer(7, 4, expected([1, 2, 3, 4], 4))])
    # What comes by a packet is answered by one.
    target.connection.send(calls(2, 4, [5]))
    by_packet = read_by_target(target.connection.recv(1000))
    assert isinstance(by_packet, Answers)
    assert by_packet.answers == [Answer(7, 5, expected([1, 2, 3, 4, 5], 4))]
    assert target.mailbox.take(0) is None


def test_a_draft_that_sleeps_is_rung(target: HandTarget) -> None:
    target.until_open()
    for epoch in (1, 2):
        # It has not been asked for so long that it does not look any more.
        time.sleep(4 * MOST_SPIN_S)
        assert target.post(calls(epoch, 0, [1]), epoch)
        assert target.answered().epoch == epoch
    # Now it looks, unless this process was held up.
    target.post(calls(3, 0, [1]), 3)
    assert target.answered().epoch == 3


def test_a_draft_without_a_core_takes_no_mailbox() -> None:
    target = HandTarget(spins=False)
    target.connection.send(calls(1, 0, [1]))
    found = read_by_target(target.connection.recv(1000))
    assert isinstance(found, Answers)
    assert found.answers == [Answer(7, 1, expected([1], 4))]
    assert not target.mailbox.has_reader
    target.close()


def test_a_call_behind_packets_that_were_never_sent_ends_the_channel(target: HandTarget) -> None:
    target.until_open()
    target.post(calls(1, 0, [1]), 99)
    assert target.connection.recv(1000) == b""
    assert not target.draft.is_failed


def test_memory_that_is_none_ends_the_channel() -> None:
    memory = os.memfd_create("test")
    target = HandTarget(memory=memory)
    os.close(memory)
    assert target.connection.recv(1000) == b""
    assert not target.draft.is_failed
    target.close()
