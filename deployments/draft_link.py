"""A target's end of the way to a draft: packets over a socket where both are on one node, else calls."""

import asyncio
import concurrent.futures
import contextlib
import os
import select
import socket
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Protocol

from deployments.draft_messages import (
    MOST_BYTES,
    MOST_IDS,
    Answers,
    BadMessage,
    Call,
    Calls,
    Feed,
    Forget,
    OfferMailbox,
    Ring,
    call_of,
    drafts_of,
    pack,
    read_by_target,
)
from serve_app.engine.speculation.draft_call import DraftCall, Drafted
from serve_app.engine.speculation.proposer import DraftWish, no_work
from serve_app.engine.speculation.waiting import LOOK_S, Mailbox, Waiting, mailbox_memory

SILENCE_S = 2.0
"""A draft that owes an answer for so long is not asked any more: the way to it is opened anew."""
LIMIT_SHARE = 0.8
"""Of the time until the deadline the draft may use so much; the rest is for the way."""


class LinkLost(Exception):
    """The other end is gone, or does not answer any more."""


class DraftLink(Protocol):
    """One life of a way to one draft replica. All calls on one thread; they raise nothing but LinkLost."""

    def ask(
        self, wishes: Sequence[DraftWish], until_s: float, meanwhile: Callable[[], None] = no_work
    ) -> list[Drafted] | None:
        """The answers, if they come until then (time.monotonic()). None: they do not; while an earlier one is owed
        nothing is asked, and this returns at once. meanwhile: see Proposer."""
        ...

    @property
    def is_owed(self) -> bool:
        """Whether the draft owes an answer that nobody waits for any more."""
        ...

    @property
    def work_s(self) -> float | None:
        """Of the last answer the seconds that were not for the way; None: not known."""
        ...

    def tell(self, sequence: int, token_ids: Sequence[int]) -> None:
        """Lets the draft know a prompt, as much of it as can be sent at once."""
        ...

    def forget(self, sequence: int) -> None:
        """A sequence ended."""
        ...

    def close(self) -> None:
        """Ends it; the draft forgets all that came through it."""
        ...


Told = dict[Hashable, int]
"""How many tokens of each sequence the draft was told: those that are not in it, none."""


def _drop_unknown(told: Told, asked: Sequence[Hashable], answers: Sequence[Drafted]) -> list[Hashable]:
    """Sequences that the draft does not know, by its answers, are to be told from their beginning, next time; returns
    which."""
    unknown = [sequence for sequence, drafted in zip(asked, answers, strict=True) if drafted is None]
    for sequence in unknown:
        told.pop(sequence, None)
    return unknown


class ChannelLink:
    """See DraftLink: a Unix socket of packets, see draft_messages."""

    def __init__(self, path: str, *, spins: bool = False) -> None:
        """Connects at once, or raises OSError. spins: see Waiting."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.setblocking(False)
            self._socket.connect(path)
            self._socket.setblocking(True)
        except BaseException:
            self._socket.close()
            raise
        self._waiting = Waiting(spins=spins)
        self._waiting.add(self._socket.fileno())
        self._writable = select.poll()
        self._writable.register(self._socket, select.POLLOUT)
        self._buffer = bytearray(MOST_BYTES)
        self._num_packets = 0
        self._mailbox = self._offer_mailbox()
        self._told: Told = {}
        self._ended: list[int] = []
        self._epoch = self._answered = 0
        self._asked_s = 0.0
        self.work_s: float | None = None

    @property
    def is_owed(self) -> bool:
        """See DraftLink."""
        return self._answered != self._epoch

    def ask(
        self, wishes: Sequence[DraftWish], until_s: float, meanwhile: Callable[[], None] = no_work
    ) -> list[Drafted] | None:
        """See DraftLink."""
        if self.is_owed and self._receive(0.0) is None:
            if time.monotonic() - self._asked_s > SILENCE_S:
                raise LinkLost("no answer")
            return None
        told, room = self._told, MOST_IDS
        calls: list[Call] = []
        for wish in wishes:
            known = len(wish.token_ids)
            base = told.get(wish.sequence, 0)
            if known - base > room:
                if not self._feed(wish.sequence, wish.token_ids, until_s):
                    return None
                base = known
            room -= known - base
            calls.append(call_of(wish, base))
        self._epoch += 1
        self._asked_s = asked_s = time.monotonic()
        limit_s = max(0.0, until_s - asked_s) * LIMIT_SHARE
        if not self._put(pack(Calls(self._epoch, limit_s, asked_s, calls)), until_s):
            self._answered = self._epoch
            return None
        for wish in wishes:
            told[wish.sequence] = len(wish.token_ids)
        if not self._waiting.wait(min(LOOK_S, until_s - asked_s) if self._waiting.spins else 0.0):
            meanwhile()
        found = self._receive(until_s)
        if found is None:
            return None
        try:
            answers = drafts_of(found, wishes)
        except BadMessage as error:
            raise LinkLost(str(error)) from error
        if None in answers:
            _drop_unknown(told, [wish.sequence for wish in wishes], answers)
        self.work_s = found.work_s
        return answers

    def tell(self, sequence: int, token_ids: Sequence[int]) -> None:
        """See DraftLink."""
        self._feed(sequence, token_ids, 0.0)

    def forget(self, sequence: int) -> None:
        """See DraftLink."""
        if self._told.pop(sequence, None) is not None:
            self._ended.append(sequence)
            self._send_ended(0.0)

    def close(self) -> None:
        """See DraftLink."""
        self._socket.close()

    def _offer_mailbox(self) -> Mailbox | None:
        """None: messages are packets."""
        if not self._waiting.spins:
            return None
        with contextlib.suppress(OSError):
            memory = mailbox_memory()
            try:
                mailbox = self._waiting.open_mailbox(memory, self._socket.fileno(), is_first=True)
                socket.send_fds(self._socket, [pack(OfferMailbox())], [memory], socket.MSG_DONTWAIT)
                self._num_packets += 1
                return mailbox
            finally:
                os.close(memory)
        return None

    def _feed(self, sequence: int, token_ids: Sequence[int], until_s: float) -> bool:
        """Sends what the draft does not know yet; False: not all of it could be sent until then."""
        for base in range(self._told.get(sequence, 0), len(token_ids), MOST_IDS):
            ids = list(token_ids[base : base + MOST_IDS])
            if not self._send(pack(Feed(sequence, base, ids)), until_s):
                return False
            self._told[sequence] = base + len(ids)
        return True

    def _put(self, calls: bytes, until_s: float) -> bool:
        """Lets the draft have calls, by the way on which it looks for them. False: it does not read."""
        mailbox = self._mailbox
        if mailbox is None or not mailbox.has_reader or len(calls) > MOST_BYTES:
            return self._send(calls, until_s)
        self._send_ended(until_s)
        if mailbox.post(calls, self._num_packets):
            self._send_one(pack(Ring()), until_s)
        return True

    def _send(self, message: bytes, until_s: float) -> bool:
        """Sends a message, and before it which sequences ended; False: the draft does not read."""
        self._send_ended(until_s)
        return self._send_one(message, until_s)

    def _send_ended(self, until_s: float) -> None:
        if self._ended and self._send_one(pack(Forget(self._ended[:MOST_IDS])), until_s):
            del self._ended[:MOST_IDS]

    def _send_one(self, message: bytes, until_s: float) -> bool:
        while True:
            try:
                self._socket.send(message, socket.MSG_DONTWAIT)
                self._num_packets += 1
                return True
            except BlockingIOError:
                pass
            except OSError as error:
                raise LinkLost(str(error)) from error
            wait_s = until_s - time.monotonic()
            if wait_s <= 0 or not self._writable.poll(wait_s * 1000):
                return False

    def _receive(self, until_s: float) -> Answers | None:
        """Those to the last calls; earlier ones are dropped. None: they do not come until then."""
        while True:
            try:
                if not self._waiting.wait(until_s - time.monotonic()):
                    return None
                packet = None if self._mailbox is None else self._mailbox.take(0)
                message = read_by_target(self._packet() if packet is None else packet)
            except (OSError, ValueError, BadMessage) as error:
                raise LinkLost(str(error)) from error
            if isinstance(message, Answers) and message.epoch == self._epoch:
                self._answered = self._epoch
                return message

    def _packet(self) -> memoryview:
        size = self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        if not size:
            raise LinkLost("the draft has ended")
        return memoryview(self._buffer)[:size]


AskReplica = Callable[[Sequence[DraftCall], Sequence[int], float], Awaitable[list[Drafted]]]
"""propose() of a draft replica: calls, sequences that ended, limit_s."""


class CallLink:
    """See DraftLink: a draft elsewhere, asked by calls that an event loop makes.

    A call takes about as long as a step. So the next one is made at once, for the text that there will be if all of an
    answer is accepted, while the target verifies it; only where that turns out to be wrong the next step waits for a
    call of its own. Calls are made one after the other: the draft sees them in their order.
    """

    work_s = None

    def __init__(self, call: AskReplica, loop: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._loop = loop
        self._told: Told = {}
        # What the draft was told beyond that, without being sure.
        self._guesses: dict[Hashable, list[int]] = {}
        self._ended: list[int] = []
        self._calls: list[DraftCall] = []
        self._under_way: concurrent.futures.Future[list[Drafted]] | None = None
        # Somebody has waited for it in vain.
        self._is_late = False
        self._asked_s = 0.0

    @property
    def is_owed(self) -> bool:
        """See DraftLink."""
        return self._is_late

    def ask(
        self, wishes: Sequence[DraftWish], until_s: float, meanwhile: Callable[[], None] = no_work
    ) -> list[Drafted] | None:
        """See DraftLink."""
        # The loop that calls has all of the interpreter while this thread waits.
        meanwhile()
        limit_s = max(0.0, until_s - time.monotonic()) * LIMIT_SHARE
        early = self._early(until_s)
        if early is None:
            return None
        answers = [self._continued(wish, early.get(wish.sequence)) for wish in wishes]
        missing = [i for i, drafted in enumerate(answers) if drafted is None]
        if missing:
            self._make_call([self._change(wishes[i]) for i in missing], limit_s)
            asked = self._wait(until_s)
            if asked is None:
                return answers if any(answers) else None
            for i, drafted in zip(missing, asked, strict=True):
                answers[i] = drafted
        self._guess(wishes, answers, limit_s)
        return answers

    def tell(self, sequence: int, token_ids: Sequence[int]) -> None:
        """See DraftLink. A call would cost more than the prompt with the first wish."""

    def forget(self, sequence: int) -> None:
        """See DraftLink."""
        self._guesses.pop(sequence, None)
        if self._told.pop(sequence, None) is not None:
            self._ended.append(sequence)

    def close(self) -> None:
        """See DraftLink."""
        if self._under_way is not None:
            self._under_way.cancel()

    def _early(self, until_s: float) -> dict[Hashable, Drafted] | None:
        """What was guessed right, perhaps: the answers to the last call, where that was a guess. None: it is still
        under way."""
        if self._under_way is None:
            return {}
        was_late = self._is_late
        answers = self._wait(0.0 if was_late else until_s)
        if answers is None:
            if time.monotonic() - self._asked_s > SILENCE_S:
                raise LinkLost("no answer")
            return None
        # Too late to be of use; what it was told, the draft knows.
        if was_late:
            return {}
        return {call.sequence: drafted for call, drafted in zip(self._calls, answers, strict=True)}

    def _continued(self, wish: DraftWish, early: Drafted) -> Drafted:
        """What of an answer to a guess follows a text; None: nothing."""
        base = self._told.get(wish.sequence, 0)
        guess = self._guesses.pop(wish.sequence, [])
        new = wish.token_ids[base:]
        common = next(
            (i for i, (a, b) in enumerate(zip(guess, new, strict=False)) if a != b), min(len(guess), len(new))
        )
        if base:
            self._told[wish.sequence] = base + common
        rest = list(new[common:])
        if early is None or common < len(guess) or list(early[: len(rest)]) != rest or len(early) == len(rest):
            return None
        return early[len(rest) :][: wish.max_tokens]

    def _change(self, wish: DraftWish, guess: Sequence[int] = (), more: int = 0) -> DraftCall:
        base = self._told.get(wish.sequence, 0)
        self._told[wish.sequence] = len(wish.token_ids)
        return DraftCall(wish.sequence, base, [*wish.token_ids[base:], *guess], wish.max_tokens + more, wish.chain)

    def _guess(self, wishes: Sequence[DraftWish], answers: Sequence[Drafted], limit_s: float) -> None:
        calls = []
        for wish, drafted in zip(wishes, answers, strict=True):
            if drafted is not None:
                calls.append(self._change(wish, drafted, 1))
                self._guesses[wish.sequence] = list(drafted)
        if calls:
            self._make_call(calls, limit_s)

    def _make_call(self, calls: list[DraftCall], limit_s: float) -> None:
        self._asked_s = time.monotonic()
        self._calls = calls
        ended, self._ended = self._ended, []
        self._under_way = asyncio.run_coroutine_threadsafe(self._run(calls, ended, limit_s), self._loop)

    async def _run(self, calls: Sequence[DraftCall], ended: Sequence[int], limit_s: float) -> list[Drafted]:
        return await self._call(calls, ended, limit_s)

    def _wait(self, until_s: float) -> list[Drafted] | None:
        """The answers to the call under way; None: they do not come until then."""
        future = self._under_way
        assert future is not None
        try:
            answers = future.result(max(0.0, until_s - time.monotonic()))
        except TimeoutError:
            if future.done():
                raise LinkLost("the call has timed out") from None
            self._is_late = True
            return None
        except concurrent.futures.CancelledError:
            raise LinkLost("the call was cancelled") from None
        except Exception as error:
            raise LinkLost(str(error)) from error
        self._under_way, self._is_late = None, False
        for sequence in _drop_unknown(self._told, [call.sequence for call in self._calls], answers):
            self._guesses.pop(sequence, None)
        return answers
