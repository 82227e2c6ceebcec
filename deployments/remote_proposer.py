"""Proposer over a draft replica: it proposes what comes in time, and nothing else ever reaches the engine."""

import asyncio
import contextlib
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deployments.draft_link import CallLink, ChannelLink, DraftLink, LinkLost
from serve_app.engine.speculation.draft_call import Draft, DraftCall, Drafted, SampledTokens
from serve_app.engine.speculation.proposer import DraftWish, no_work
from serve_app.metrics import EXCHANGE_S
from serve_app.text.vocabulary_digest import refusal, vocabulary_digest

log = logging.getLogger(__name__)

FIRST_DELAY_S, LAST_DELAY_S = 0.1, 2.0
OPEN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class DraftOffer:
    """How a draft can be reached. vocabulary: what its ids mean (text.vocabulary_digest), None where it is the
    target's, or does not matter: maps_text."""

    node_id: str
    path: str
    pid: int
    vocabulary: list[bytes] | None
    maps_text: bool


class DraftReplica(Protocol):
    """The calls of a draft replica, through Serve or not."""

    async def open_channel(self, digest: bytes) -> DraftOffer:
        """digest: of the target's vocabulary."""
        ...

    async def propose(
        self, client: str, calls: Sequence[DraftCall], ended: Sequence[int], limit_s: float
    ) -> list[Drafted]:
        """client: whose sequences these are."""
        ...


class Durations:
    """counts: how many there were up to each of EXCHANGE_S, and beyond."""

    def __init__(self) -> None:
        self.counts = [0] * (len(EXCHANGE_S) + 1)
        self.total_s = 0.0

    def note(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(EXCHANGE_S, seconds)] += 1
        self.total_s += seconds


class DraftCounts:
    """What happened on the way to the draft. exchanges: those that were answered. messaging: what of these was not the
    draft's work, where that is known."""

    def __init__(self) -> None:
        self.num_timeouts = 0
        self.num_skipped = 0
        self.num_losses = 0
        self.num_opened = 0
        self.exchanges = Durations()
        self.messaging = Durations()


class RemoteProposer:
    """See Proposer. Made on the event loop of the target's replica, which opens the way to the draft, and opens it
    again whenever it is lost; until then nothing is proposed.

    refusal: why this draft is never asked, None unless it has another vocabulary.
    """

    name = "draft"

    def __init__(
        self,
        draft: DraftReplica,
        client: str,
        node_id: str,
        vocabulary: Sequence[bytes],
        deadline_s: float,
        *,
        spins: bool = False,
    ) -> None:
        """client: a name that no other target has, in this life. vocabulary: the target's; proposals end before an id
        beyond. deadline_s: how long a step waits at most. spins: see Waiting."""
        self.counts = DraftCounts()
        self.refusal: str | None = None
        self._draft = draft
        self._client = client
        self._node_id = node_id
        self._vocabulary = vocabulary
        self._deadline_s = deadline_s
        self._spins = spins
        self._loop = asyncio.get_running_loop()
        self._link: DraftLink | None = None
        self._is_closed = False
        self._is_lost = asyncio.Event()
        self._is_lost.set()
        self._opening = self._loop.create_task(self._keep_open())

    @property
    def num_timeouts(self) -> int:
        """See Proposer."""
        return self.counts.num_timeouts

    @property
    def is_open(self) -> bool:
        """See Proposer."""
        return self._link is not None

    @property
    def has_channel(self) -> bool:
        """Whether it is asked by packets."""
        return isinstance(self._link, ChannelLink)

    # -- on the engine's thread -----------------------------------------------------------------------------------

    def admit(self, sequence: int, token_ids: Sequence[int], scope: bytes = b"") -> None:
        """See Proposer."""
        if (link := self._link) is not None:
            try:
                link.tell(sequence, token_ids)
            except LinkLost as error:
                self._lose(link, error)

    def propose(self, wishes: Sequence[DraftWish], meanwhile: Callable[[], None] = no_work) -> list[Draft]:
        """See Proposer."""
        answers = self._ask(wishes, meanwhile) if wishes else None
        if answers is None:
            return [[] for _ in wishes]
        return [self._usable(drafted, wish) for drafted, wish in zip(answers, wishes, strict=True)]

    def forget(self, sequence: int, token_ids: Sequence[int] = ()) -> None:
        """See Proposer."""
        if (link := self._link) is not None:
            try:
                link.forget(sequence)
            except LinkLost as error:
                self._lose(link, error)

    def close(self) -> None:
        """See Proposer. From any thread; once the engine does not call any more."""
        self._is_closed = True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._opening.cancel)
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _ask(self, wishes: Sequence[DraftWish], meanwhile: Callable[[], None]) -> list[Drafted] | None:
        link = self._link
        if link is None:
            return None
        began_s = time.monotonic()
        was_owed = link.is_owed
        try:
            answers = link.ask(wishes, began_s + self._deadline_s, meanwhile)
        except LinkLost as error:
            self._lose(link, error)
            return None
        if answers is not None:
            seconds = time.monotonic() - began_s
            self.counts.exchanges.note(seconds)
            if link.work_s is not None:
                self.counts.messaging.note(seconds - link.work_s)
        elif was_owed and link.is_owed:
            self.counts.num_skipped += 1
        else:
            self.counts.num_timeouts += 1
        return answers

    def _usable(self, drafted: Drafted, wish: DraftWish) -> Draft:
        drafted = (drafted or [])[: wish.max_tokens]
        size = len(self._vocabulary)
        end = next((i for i, token_id in enumerate(drafted) if not 0 <= token_id < size), len(drafted))
        if isinstance(drafted, SampledTokens):
            # Whichever of the candidates was sampled: see SampledTokens.
            is_unknown = ((drafted.candidates < 0) | (drafted.candidates >= size)).any(axis=1)
            end = min([end, *np.flatnonzero(is_unknown).tolist()])
        return drafted[:end]

    def _lose(self, link: DraftLink, error: Exception) -> None:
        log.info("the way to the draft is lost: %s", error)
        self.counts.num_losses += 1
        self._link = None
        link.close()
        with contextlib.suppress(RuntimeError):  # the loop is closed: the replica ends
            self._loop.call_soon_threadsafe(self._is_lost.set)

    # -- on the event loop ----------------------------------------------------------------------------------------

    async def _keep_open(self) -> None:
        delay_s = FIRST_DELAY_S
        while self.refusal is None:
            await self._is_lost.wait()
            self._is_lost.clear()
            try:
                link = await self._open()
            except Exception as error:  # whatever Ray raises for a replica that is not there
                log.debug("no way to the draft yet: %r", error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, LAST_DELAY_S)
                self._is_lost.set()
                continue
            delay_s = FIRST_DELAY_S
            if self._is_closed:
                return
            if link is not None:
                self.counts.num_opened += 1
                self._link = link

    async def _open(self) -> DraftLink | None:
        digest = vocabulary_digest(self._vocabulary)
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            offer = await self._draft.open_channel(digest)
        if offer.vocabulary is not None and not offer.maps_text:
            self.refusal = refusal(self._vocabulary, offer.vocabulary)
            log.error("%s", self.refusal)
            return None
        if offer.node_id == self._node_id:
            # Not seen from here: another container. One that refuses is dead, and another will be there soon.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                link = ChannelLink(offer.path, spins=self._spins)
                log.info("a channel to the draft in process %d is open", offer.pid)
                return link
            log.warning("the draft's socket %s cannot be reached: it is asked by calls, which are slower", offer.path)
        return CallLink(self._call, self._loop)

    async def _call(self, calls: Sequence[DraftCall], ended: Sequence[int], limit_s: float) -> list[Drafted]:
        return await self._draft.propose(self._client, calls, ended, limit_s)
