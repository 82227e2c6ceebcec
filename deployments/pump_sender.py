"""The target's end of the token path: takes deltas from the engine's thread, sends them to the ingress replicas."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from deployments.loop_socket import LoopSocket
from deployments.token_pump import (
    CANCEL,
    CREDIT,
    CREDIT_WINDOW,
    HEARTBEAT,
    SILENCE_TICKS,
    TICK_S,
    BadMessage,
    pack,
    pack_tokens,
    unpack,
)
from serve_app.errors import EngineFailed, Unavailable
from serve_app.messages import Finish, StreamAddress, TokenDelta

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Outgoing:
    """One request on its way. finished holds its choices' Finish, or the error that ended it."""

    request_id: str
    link: "_Link"
    num_choices: int
    finished: "asyncio.Future[list[Finish]]"
    finishes: dict[int, Finish] = field(default_factory=dict)
    num_sent: int = 0
    num_consumed: int = 0
    is_paused: bool = False


@dataclass(slots=True)
class _Link:
    """The socket to one life of one ingress replica."""

    address: StreamAddress
    socket: LoopSocket
    sequence: int = 0
    silent_ticks: int = 0
    requests: dict[str, _Outgoing] = field(default_factory=dict)


class TokenSender:
    """Sends tokens, counts credit, notices lost ingress replicas. `publish` is thread-safe, the rest is the loop's.

    pause and resume are called with a request id when its client stops and starts again to keep up. A request whose
    ingress is lost has its future failed with EngineFailed, one that the ingress gave up with Unavailable; the caller
    then aborts it.
    """

    def __init__(
        self,
        sender_id: str,
        node_id: str,
        loop: asyncio.AbstractEventLoop,
        *,
        pause: Callable[[str], None],
        resume: Callable[[str], None],
        tick_s: float = TICK_S,
        window: int = CREDIT_WINDOW,
    ) -> None:
        self._sender_id = sender_id
        self._node_id = node_id
        self._loop = loop
        self._pause = pause
        self._resume = resume
        self._tick_s = tick_s
        self._window = window
        self._context = zmq.Context(io_threads=1)
        self._links: dict[tuple[str, int], _Link] = {}
        self._num_links = 0
        self._requests: dict[str, _Outgoing] = {}
        self._published: deque[list[TokenDelta]] = deque()
        self._is_flush_due = False
        self._ticker = loop.create_task(self._tick_forever())

    def open(self, request_id: str, address: StreamAddress, num_choices: int) -> "asyncio.Future[list[Finish]]":
        """Announces a request before its first delta. The future ends with the request: one Finish per choice."""
        link = self._link_to(address)
        future: asyncio.Future[list[Finish]] = self._loop.create_future()
        outgoing = _Outgoing(request_id, link, num_choices, future)
        self._requests[request_id] = link.requests[request_id] = outgoing
        return future

    def close(self, request_id: str) -> None:
        """Forgets a request; deltas still published for it are dropped."""
        outgoing = self._requests.pop(request_id, None)
        if outgoing is not None:
            outgoing.link.requests.pop(request_id, None)

    def publish(self, deltas: list[TokenDelta]) -> None:
        """Takes one step's deltas, on the engine's thread. Steps that the loop finds together leave together."""
        self._published.append(deltas)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon_threadsafe(self._flush)

    def stop(self) -> None:
        """Ends the sockets. Messages already sent get a moment to leave."""
        self._ticker.cancel()
        for link in self._links.values():
            link.socket.close(linger_ms=500)
        self._links.clear()
        self._context.term()

    def _flush(self) -> None:
        # Cleared first: a step published from here on schedules the next flush.
        self._is_flush_due = False
        batches: dict[int, tuple[_Link, list[TokenDelta]]] = {}
        ended: list[_Outgoing] = []
        while self._published:
            for delta in self._published.popleft():
                outgoing = self._requests.get(delta.request_id)
                if outgoing is None:
                    continue
                link = outgoing.link
                batch = batches.get(id(link))
                if batch is None:
                    batch = batches[id(link)] = (link, [])
                batch[1].append(delta)
                outgoing.num_sent += 1
                if delta.finish is not None:
                    outgoing.finishes[delta.choice] = delta.finish
                    if len(outgoing.finishes) == outgoing.num_choices or delta.finish.error is not None:
                        ended.append(outgoing)
                elif outgoing.num_sent - outgoing.num_consumed >= self._window and not outgoing.is_paused:
                    outgoing.is_paused = True
                    self._pause(outgoing.request_id)
        for link, deltas in batches.values():
            message = pack_tokens(link.address.epoch, link.sequence, deltas)
            link.sequence += 1
            if not link.socket.send((message,)):
                self._lose(link, "its queue is full")
        for outgoing in ended:
            self._end(outgoing)

    def _end(self, outgoing: _Outgoing) -> None:
        self.close(outgoing.request_id)
        if outgoing.finished.done():
            return
        finishes = list(outgoing.finishes.values())
        error = next((f.error for f in finishes if f.error is not None), None)
        if error is not None:
            outgoing.finished.set_exception(error)
        else:
            outgoing.finished.set_result(finishes)

    def _link_to(self, address: StreamAddress) -> _Link:
        key = (address.ingress_id, address.epoch)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = self._connect(address)
        return link

    def _connect(self, address: StreamAddress) -> _Link:
        socket = self._context.socket(zmq.DEALER)
        # A number of its own for each socket: to the ROUTER a second socket of the same name would be a stranger.
        self._num_links += 1
        socket.setsockopt(zmq.IDENTITY, f"{self._sender_id}/{self._num_links}".encode())
        if address.node_id == self._node_id and address.ipc_endpoint:
            socket.connect(address.ipc_endpoint)
        else:
            public, secret = zmq.curve_keypair()
            socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
            socket.setsockopt(zmq.CURVE_SERVERKEY, address.server_key)
            socket.connect(address.tcp_endpoint)
        link: _Link

        def receive(frames: list[bytes]) -> None:
            self._receive(link, frames)

        link = _Link(address, LoopSocket(socket, self._loop, receive))
        return link

    def _receive(self, link: _Link, frames: list[bytes]) -> None:
        try:
            kind, epoch, rest = unpack(frames[-1])
        except BadMessage as error:
            log.warning("dropped a message from ingress %s: %s", link.address.ingress_id, error)
            return
        if epoch != link.address.epoch:
            return
        link.silent_ticks = 0
        if kind == CREDIT:
            for request_id, num_consumed in rest[0]:
                self._credit(link.requests.get(request_id), num_consumed)
        elif kind == CANCEL:
            for request_id in rest[0]:
                self._cancel(link.requests.get(request_id))

    def _credit(self, outgoing: _Outgoing | None, num_consumed: int) -> None:
        if outgoing is None:
            return
        outgoing.num_consumed = max(outgoing.num_consumed, num_consumed)
        if outgoing.is_paused and outgoing.num_sent - outgoing.num_consumed < self._window:
            outgoing.is_paused = False
            self._resume(outgoing.request_id)

    def _cancel(self, outgoing: _Outgoing | None) -> None:
        if outgoing is not None:
            self.close(outgoing.request_id)
            if not outgoing.finished.done():
                outgoing.finished.set_exception(Unavailable("Nobody waits for this request any more."))

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            for link in list(self._links.values()):
                self._tick(link)

    def _tick(self, link: _Link) -> None:
        link.silent_ticks += 1
        if link.silent_ticks > SILENCE_TICKS:
            self._lose(link, "it has gone silent")
            return
        message = pack(HEARTBEAT, link.address.epoch, link.sequence)
        link.sequence += 1
        if not link.socket.send((message,)):
            self._lose(link, "its queue is full")

    def _lose(self, link: _Link, reason: str) -> None:
        """Gives up a dead ingress replica and its requests; nobody waits for their tokens any more."""
        if self._links.pop((link.address.ingress_id, link.address.epoch), None) is None:
            return
        if link.requests:
            log.warning(
                "lost ingress %s (%s): %d requests are aborted", link.address.ingress_id, reason, len(link.requests)
            )
        link.socket.close()
        for outgoing in list(link.requests.values()):
            self.close(outgoing.request_id)
            if not outgoing.finished.done():
                outgoing.finished.set_exception(EngineFailed(f"The ingress replica is lost: {reason}."))
