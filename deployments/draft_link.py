"""A target's end of the way to a draft: packets over a socket where both are on one node, else calls."""

import asyncio
import concurrent.futures
import select
import socket
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
from serve_app.engine.speculation.proposer import DraftWish, no_work
from serve_app.engine.speculation.waiting import Waiting

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


class Told:
    """How many tokens of each sequence the draft was told: those that are not in counts, none."""

    def __init__(self) -> None:
        self.counts: dict[Hashable, int] = {}

    def __getitem__(self, sequence: int) -> int:
        return self.counts.get(sequence, 0)

    def __setitem__(self, sequence: int, count: int) -> None:
        self.counts[sequence] = count

    def forget(self, sequence: int) -> bool:
        """Whether anything was told."""
        return self.counts.pop(sequence, None) is not None

    def check(self, asked: Sequence[Hashable], answers: Sequence[Drafted]) -> list[Hashable]:
        """Sequences that the draft does not know, by its answers, are to be told from their beginning, next time;
        returns which."""
        unknown = [sequence for sequence, drafted in zip(asked, answers, strict=True) if drafted is None]
        for sequence in unknown:
            self.counts.pop(sequence, None)
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
        self._told = Told()
        self._ended: list[int] = []
        self._epoch = self._answered = 0
        self._asked_s = 0.0
        # What was received last, and what it answers; no wishes, where it is no answer in time.
        self._packet = memoryview(self._buffer)
        self._answered_wishes: Sequence[DraftWish] = ()
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
        told, room = self._told.counts, MOST_IDS
        numbers: list[int] = []
        ids: list[int] = []
        for wish in wishes:
            sequence, known = wish.sequence, len(wish.token_ids)
            base = told.get(sequence, 0)
            if known - base > room:
                if not self._feed(sequence, wish.token_ids, until_s):
                    return None
                base = known
            room -= known - base
            numbers += (sequence, base, known - base, wish.max_tokens)
            ids += wish.token_ids[base:]
        self._epoch += 1
        self._asked_s = asked_s = time.monotonic()
        limit_s = max(0.0, until_s - asked_s) * LIMIT_SHARE
        chains = [wish.chain for wish in wishes]
        if not self._send(pack_propose(self._epoch, limit_s, asked_s, numbers, ids, chains), until_s):
            self._answered = self._epoch
            return None
        for wish in wishes:
            told[wish.sequence] = len(wish.token_ids)
        if not self._waiting.look():
            meanwhile()
            self._rehearse()
        message = self._receive(until_s)
        if message is None:
            return None
        answers = answers_of(message, wishes)
        self._answered_wishes = wishes
        if None in answers:
            self._told.check([wish.sequence for wish in wishes], answers)
        self.work_s = message.seconds
        return answers

    def _rehearse(self) -> None:
        """Reads the last answer once more, while nothing else is to be done: the next one then finds the code for it in
        this core's cache, from where the model's weights drive it out in every step."""
        if self._waiting.spins and self._answered_wishes:
            answers_of(unpack(self._packet), self._answered_wishes)

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
        self._answered_wishes = ()
        while True:
            try:
                if not self._waiting.wait(until_s - time.monotonic()):
                    return None
                size = self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
                if not size:
                    raise LinkLost("the draft has ended")
                self._packet = memoryview(self._buffer)[:size]
                message = unpack(self._packet)
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
        for sequence in self._told.check([call.sequence for call in self._calls], answers):
            self._guesses.pop(sequence, None)
        return answers
