"""A ZeroMQ socket served by an asyncio loop, without a future per message as zmq.asyncio makes them."""

import asyncio
from collections.abc import Callable, Sequence

import zmq

# Messages taken at one wake-up before other tasks of the loop get their turn.
_BURST = 64


class LoopSocket:
    """Calls on_message(frames) on the loop for each message; owns the socket. All calls come from the loop's thread."""

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[list[bytes]], None],
    ) -> None:
        self._socket = socket
        self._loop = loop
        self._on_message = on_message
        self._fd = int(socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._receive)
        loop.call_soon(self._receive)

    @property
    def is_closed(self) -> bool:
        return self._socket.closed

    def send(self, frames: Sequence[bytes]) -> bool:
        """Hands a message to ZeroMQ, never waits. False: its queue is full, the message is not sent."""
        if self._socket.closed:
            return False
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=True)
        except zmq.Again:
            return False
        # The descriptor signals edges only: sending may have swallowed the edge of a message that came meanwhile.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._receive)
        return True

    def _receive(self) -> None:
        for _ in range(_BURST):
            if self._socket.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._on_message(frames)
        self._loop.call_soon(self._receive)

    def close(self, linger_ms: int = 0) -> None:
        """Closes the socket; what is still queued gets linger_ms to leave."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=linger_ms)
