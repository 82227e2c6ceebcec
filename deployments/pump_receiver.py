"""The ingress replica's end of the token path: takes the messages of all targets, hands each request its deltas."""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from deployments.loop_socket import LoopSocket
from deployments.token_pump import (
    CANCEL,
    CREDIT,
    CREDIT_WINDOW,
    HEARTBEAT,
    SILENCE_TICKS,
    TICK_S,
    TOKENS,
    BadMessage,
    Row,
    pack,
    unpack,
    unpack_delta,
)
from serve_app.api.backend import DeltaSink
from serve_app.errors import EngineFailed, ServeError
from serve_app.messages import StreamAddress, TokenDelta

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Source:
    """The socket of one target, as seen from here."""

    socket: LoopSocket
    identity: bytes
    sequence: int = 0
    silent_ticks: int = 0
    requests: "dict[str, IncomingTokens]" = field(default_factory=dict)


@dataclass(slots=True)
class IncomingTokens:
    """One request's stream. finished ends without a value once every choice has its finish, or with a ServeError."""

    request_id: str
    sink: DeltaSink
    num_open_choices: int
    finished: "asyncio.Future[None]"
    next_index: dict[int, int] = field(default_factory=dict)
    source: _Source | None = None
    num_pushed: int = 0
    num_credited: int = 0

    def fail(self, error: ServeError) -> None:
        if not self.finished.done():
            self.finished.set_exception(error)


class TokenReceiver:
    """Binds the sockets that targets connect to. Made and used on one event loop.

    The unix socket lies in a directory of its own, 0700, in parent_directory or among the temporary files. tcp_host:
    the address to bind for targets on other nodes, with CURVE; its key travels with the request, through Ray. None:
    targets of this node only, nothing listens on TCP.
    """

    def __init__(
        self,
        ingress_id: str,
        node_id: str,
        loop: asyncio.AbstractEventLoop,
        *,
        tcp_host: str | None = None,
        parent_directory: str | None = None,
        tick_s: float = TICK_S,
        window: int = CREDIT_WINDOW,
    ) -> None:
        self._loop = loop
        self._tick_s = tick_s
        self._credit_step = max(1, window // 2)
        self._context = zmq.Context(io_threads=1)
        self._directory = Path(tempfile.mkdtemp(prefix="sirocco-", dir=parent_directory))
        os.chmod(self._directory, 0o700)
        ipc_endpoint = f"ipc://{self._directory}/tokens"
        self._sockets = [self._bind(ipc_endpoint)]
        tcp_endpoint, server_key = "", b""
        if tcp_host is not None:
            tcp_endpoint, server_key = self._bind_tcp(tcp_host)
        self.address = StreamAddress(ingress_id, secrets.randbits(62), node_id, ipc_endpoint, tcp_endpoint, server_key)
        self._sources: dict[bytes, _Source] = {}
        self._requests: dict[str, IncomingTokens] = {}
        self._lagging: dict[str, IncomingTokens] = {}
        self._credits: dict[bytes, list[tuple[str, int]]] = {}
        self._ticker = loop.create_task(self._tick_forever())

    @property
    def num_requests(self) -> int:
        """Streams that are open now."""
        return len(self._requests)

    def open(self, request_id: str, sink: DeltaSink, num_choices: int) -> IncomingTokens:
        """Announces a request before it goes to a target."""
        assert request_id not in self._requests, request_id
        stream = IncomingTokens(request_id, sink, num_choices, self._loop.create_future())
        # A stream may fail while nobody waits for it any more.
        stream.finished.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._requests[request_id] = stream
        return stream

    def close(self, request_id: str) -> None:
        """Forgets a request; a target that still works on it is told."""
        stream = self._requests.pop(request_id, None)
        self._lagging.pop(request_id, None)
        if stream is not None and stream.source is not None:
            stream.source.requests.pop(request_id, None)
            if stream.num_open_choices > 0:
                self._cancel(stream.source, request_id)

    def fail_all(self, error: ServeError) -> None:
        """Ends every open stream with this error."""
        for stream in list(self._requests.values()):
            stream.fail(error)

    def stop(self) -> None:
        """Closes the sockets and removes their directory."""
        self._ticker.cancel()
        for socket in self._sockets:
            socket.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _bind(self, endpoint: str) -> LoopSocket:
        return self._serve(self._context.socket(zmq.ROUTER), endpoint)

    def _bind_tcp(self, host: str) -> tuple[str, bytes]:
        socket = self._context.socket(zmq.ROUTER)
        public, secret = zmq.curve_keypair()
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        if ":" in host:
            socket.setsockopt(zmq.IPV6, 1)
            host = f"[{host}]"
        self._sockets.append(self._serve(socket, f"tcp://{host}:*"))
        endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return endpoint.rstrip(b"\0").decode(), public

    def _serve(self, socket: "zmq.Socket[bytes]", endpoint: str) -> LoopSocket:
        socket.bind(endpoint)
        served: LoopSocket

        def receive(frames: list[bytes]) -> None:
            self._receive(served, frames)

        served = LoopSocket(socket, self._loop, receive)
        return served

    def _receive(self, socket: LoopSocket, frames: list[bytes]) -> None:
        identity, message = frames[0], frames[-1]
        try:
            kind, epoch, rest = unpack(message)
            if epoch != self.address.epoch:
                return
            source = self._sources.get(identity)
            if source is None:
                source = self._sources[identity] = _Source(socket, identity)
            source.silent_ticks = 0
            self._check_sequence(source, rest[0])
            if kind == TOKENS:
                self._deliver(source, rest[1])
        except (BadMessage, IndexError, TypeError, KeyError) as error:
            log.warning("dropped a message from target %r: %s", identity, error)
            return
        if self._credits:
            self._send_credits()

    def _cancel(self, source: _Source, request_id: str) -> None:
        source.socket.send((source.identity, pack(CANCEL, self.address.epoch, [request_id])))

    def _check_sequence(self, source: _Source, sequence: int) -> None:
        if sequence != source.sequence:
            self._fail_source(source, f"{sequence - source.sequence} messages from the engine were lost.")
        source.sequence = sequence + 1

    def _deliver(self, source: _Source, rows: Sequence[Row]) -> None:
        """Pushes the rows of one message; the rows of one request stand together."""
        stream: IncomingTokens | None = None
        deltas: list[TokenDelta] = []
        for row in rows:
            if stream is None or row[0] != stream.request_id:
                if stream is not None and deltas:
                    self._push(source, stream, deltas)
                stream, deltas = self._requests.get(row[0]), []
                if stream is None:
                    # Closed before its first token: only now is it known who works on it.
                    self._cancel(source, row[0])
            if stream is not None:
                deltas.append(unpack_delta(row))
        if stream is not None and deltas:
            self._push(source, stream, deltas)

    def _push(self, source: _Source, stream: IncomingTokens, deltas: list[TokenDelta]) -> None:
        if stream.source is None:
            stream.source = source
            source.requests[stream.request_id] = stream
        if stream.finished.done():
            return
        for delta in deltas:
            expected = stream.next_index.get(delta.choice, 0)
            if delta.index != expected:
                stream.fail(EngineFailed(f"Tokens {expected} to {delta.index} of choice {delta.choice} were lost."))
                return
            stream.next_index[delta.choice] = expected + len(delta.token_ids)
            if delta.finish is not None:
                stream.num_open_choices -= 1
        try:
            stream.sink.push(deltas)
        except Exception as error:  # one request's writer must not stop the pump of all
            log.exception("writing the response of %s failed", stream.request_id)
            stream.fail(EngineFailed(f"The response could not be written: {type(error).__name__}."))
            return
        stream.num_pushed += len(deltas)
        if stream.num_open_choices <= 0:
            stream.finished.set_result(None)
        elif stream.num_pushed - stream.num_credited >= self._credit_step:
            self._credit(stream)

    def _credit(self, stream: IncomingTokens) -> None:
        """Reports what the client has consumed, or puts the stream on the list of those to look at again."""
        num_consumed = stream.num_pushed - stream.sink.backlog
        if num_consumed - stream.num_credited < self._credit_step:
            self._lagging[stream.request_id] = stream
            return
        self._lagging.pop(stream.request_id, None)
        stream.num_credited = num_consumed
        assert stream.source is not None
        self._credits.setdefault(stream.source.identity, []).append((stream.request_id, num_consumed))

    def _send_credits(self) -> None:
        for identity, entries in self._credits.items():
            source = self._sources.get(identity)
            if source is not None:
                source.socket.send((identity, pack(CREDIT, self.address.epoch, entries)))
        self._credits.clear()

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            for stream in list(self._lagging.values()):
                self._credit(stream)
            self._send_credits()
            for source in list(self._sources.values()):
                self._tick(source)

    def _tick(self, source: _Source) -> None:
        # Counted in ticks of this loop, not by the clock: a stall of our own must not pass for the target's.
        source.silent_ticks += 1
        if source.silent_ticks > SILENCE_TICKS:
            del self._sources[source.identity]
            self._fail_source(source, "The engine's replica has gone silent.")
            return
        with contextlib.suppress(zmq.ZMQError):  # the ROUTER does not know a peer that has just gone
            source.socket.send((source.identity, pack(HEARTBEAT, self.address.epoch)))

    def _fail_source(self, source: _Source, reason: str) -> None:
        if source.requests:
            log.warning("target %r: %s %d streams end", source.identity, reason, len(source.requests))
        for stream in list(source.requests.values()):
            stream.fail(EngineFailed(reason))
