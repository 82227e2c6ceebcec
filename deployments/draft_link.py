"""A target's end of the way to a draft: packets over a socket where both are on one node, else calls."""

import asyncio
import concurrent.futures
import select
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Protocol

from deployments.draft_messages import (
    MOST_BYTES,
    MOST_IDS,
    BadMessage,
    Message,
    answers_of,
    pack_feed,
    pack_forget,
    pack_propose,
    unpack,
)
from serve_app.engine.speculation.draft_call import DraftCall, Drafted
from serve_app.engine.speculation.proposer import DraftWish

SILENCE_S = 2.0
"""A draft that owes an answer for so long is not asked any more: the way to it is opened anew."""
LIMIT_SHARE = 0.8
"""Of the time until the deadline the draft may use so much; the rest is for the way."""

# An answer that comes so soon finds this core awake: waking it would take longer than the exchange itself.
_SPIN_S = 60e-6
_TIMEVAL = struct.Struct("@ll")


class LinkLost(Exception):
    """The other end is gone, or does not answer any more."""


class DraftLink(Protocol):
    """One life of a way to one draft replica. All calls on one thread; they raise nothing but LinkLost."""

    def ask(self, wishes: Sequence[DraftWish], until_s: float) -> list[Drafted] | None:
        """The answers, if they come until then (time.monotonic()). None: they do not; while an earlier one is owed
        nothing is asked, and this returns at once."""
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


class Told:
    """How many tokens of each sequence the draft was told."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def __getitem__(self, sequence: int) -> int:
        return self._counts.get(sequence, 0)

    def __setitem__(self, sequence: int, count: int) -> None:
        self._counts[sequence] = count

    def forget(self, sequence: int) -> bool:
        """Whether anything was told."""
        return self._counts.pop(sequence, None) is not None

    def check(self, calls: Sequence[DraftCall], answers: Sequence[Drafted]) -> list[int]:
        """What the draft does not know, by its answers, is to be told from its beginning, next time; returns which."""
        unknown = []
        for call, drafted in zip(calls, answers, strict=True):
            if drafted is None:
                assert isinstance(call.sequence, int)
                self.forget(call.sequence)
                unknown.append(call.sequence)
        return unknown


class ChannelLink:
    """See DraftLink: a Unix socket of packets, see draft_messages."""

    def __init__(self, path: str) -> None:
        """Connects at once, or raises OSError."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.setblocking(False)
            self._socket.connect(path)
            self._socket.setblocking(True)
        except BaseException:
            self._socket.close()
            raise
        self._writable = select.poll()
        self._writable.register(self._socket, select.POLLOUT)
        self._buffer = bytearray(MOST_BYTES)
        self._told = Told()
        self._ended: list[int] = []
        self._epoch = self._answered = 0
        self._asked_s = 0.0
        self.work_s: float | None = None

    @property
    def is_owed(self) -> bool:
        """See DraftLink."""
        return self._answered != self._epoch

    def ask(self, wishes: Sequence[DraftWish], until_s: float) -> list[Drafted] | None:
        """See DraftLink."""
        if self.is_owed and self._receive(0.0) is None:
            if time.monotonic() - self._asked_s > SILENCE_S:
                raise LinkLost("no answer")
            return None
        calls, room = [], MOST_IDS
        for wish in wishes:
            base = self._told[wish.sequence]
            if len(wish.token_ids) - base > room:
                if not self._feed(wish.sequence, wish.token_ids, until_s):
                    return None
                base = len(wish.token_ids)
            new = list(wish.token_ids[base:])
            room -= len(new)
            calls.append(DraftCall(wish.sequence, base, new, wish.max_tokens, wish.chain))
        self._epoch += 1
        self._asked_s = time.monotonic()
        limit_s = max(0.0, until_s - self._asked_s) * LIMIT_SHARE
        if not self._send(pack_propose(self._epoch, limit_s, calls), until_s):
            self._answered = self._epoch
            return None
        for wish in wishes:
            self._told[wish.sequence] = len(wish.token_ids)
        message = self._receive(until_s)
        if message is None:
            return None
        answers = answers_of(message, calls)
        self._told.check(calls, answers)
        self.work_s = message.seconds
        return answers

    def tell(self, sequence: int, token_ids: Sequence[int]) -> None:
        """See DraftLink."""
        self._feed(sequence, token_ids, 0.0)

    def forget(self, sequence: int) -> None:
        """See DraftLink."""
        if self._told.forget(sequence):
            self._ended.append(sequence)
            self._send(b"", 0.0)

    def close(self) -> None:
        """See DraftLink."""
        self._socket.close()

    def _feed(self, sequence: int, token_ids: Sequence[int], until_s: float) -> bool:
        """Sends what the draft does not know yet; False: not all of it could be sent until then."""
        for base in range(self._told[sequence], len(token_ids), MOST_IDS):
            ids = token_ids[base : base + MOST_IDS]
            if not self._send(pack_feed(self._epoch, sequence, base, ids), until_s):
                return False
            self._told[sequence] = base + len(ids)
        return True

    def _send(self, message: bytes, until_s: float) -> bool:
        """Sends a message, and before it which sequences ended; False: the draft does not read."""
        if self._ended and self._send_one(pack_forget(self._epoch, self._ended[:MOST_IDS]), until_s):
            del self._ended[:MOST_IDS]
        return not message or self._send_one(message, until_s)

    def _send_one(self, message: bytes, until_s: float) -> bool:
        while True:
            try:
                self._socket.send(message, socket.MSG_DONTWAIT)
                return True
            except BlockingIOError:
                pass
            except OSError as error:
                raise LinkLost(str(error)) from error
            wait_s = until_s - time.monotonic()
            if wait_s <= 0 or not self._writable.poll(wait_s * 1000):
                return False

    def _receive(self, until_s: float) -> Message | None:
        """The answer to the last call; earlier ones are dropped. None: it does not come until then."""
        while True:
            wait_us = int((until_s - time.monotonic()) * 1e6)
            flags: int = socket.MSG_DONTWAIT
            is_fresh = time.monotonic() - self._asked_s < _SPIN_S
            if wait_us > 0 and not is_fresh:
                # Half the time of a poll and a receive.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(*divmod(wait_us, 10**6)))
                flags = 0
            try:
                size = self._socket.recv_into(self._buffer, 0, flags)
                if not size:
                    raise LinkLost("the draft has ended")
                message = unpack(memoryview(self._buffer)[:size])
            except BlockingIOError:
                if wait_us > 0 and is_fresh:
                    continue
                return None
            except (OSError, BadMessage) as error:
                raise LinkLost(str(error)) from error
            if message.epoch == self._epoch:
                self._answered = self._epoch
                return message


Call = Callable[[Sequence[DraftCall], Sequence[int], float], Awaitable[list[Drafted]]]
"""propose() of a draft replica: calls, sequences that ended, limit_s."""


class CallLink:
    """See DraftLink: a draft elsewhere, asked by calls that an event loop makes.

    A call takes about as long as a step. So the next one is made at once, for the text that there will be if all of an
    answer is accepted, while the target verifies it; only where that turns out to be wrong the next step waits for a
    call of its own. Calls are made one after the other: the draft sees them in their order.
    """

    work_s = None

    def __init__(self, call: Call, loop: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._loop = loop
        self._told = Told()
        # What the draft was told beyond that, without being sure.
        self._guesses: dict[int, list[int]] = {}
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

    def ask(self, wishes: Sequence[DraftWish], until_s: float) -> list[Drafted] | None:
        """See DraftLink."""
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
        if self._told.forget(sequence):
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
        base = self._told[wish.sequence]
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
        base = self._told[wish.sequence]
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
        for sequence in self._told.check(self._calls, answers):
            self._guesses.pop(sequence, None)
        return answers
