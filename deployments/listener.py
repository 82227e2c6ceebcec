"""The ingress replica's own HTTP server, for a private cluster: no proxy process between client and routes."""

import asyncio
import logging
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

HEAD_TIMEOUT_S = 30.0
KEEP_ALIVE_S = 75
BACKLOG = 2048

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def bind(host: str, port: int, *, is_shared: bool) -> socket.socket:
    """A listening socket. is_shared: several replicas take turns on the port, by the kernel. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of an earlier server in TIME_WAIT must not keep a new one from starting.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class Listener:
    """A uvicorn server on the replica's event loop, over a socket that is bound already."""

    def __init__(self, app: Any, listener: socket.socket, *, max_header_bytes: int) -> None:
        config = uvicorn.Config(
            app,
            # The routes refuse a complete head over the limit in OpenAI's form; this is for one that never ends.
            http=_limited_protocol(2 * max_header_bytes),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = uvicorn.Server(config)
        self._task = asyncio.get_running_loop().create_task(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        # Not Server.serve(): that one takes over the process's signals.
        self._server.config.load()
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup(sockets=[listener])
        await self._server.main_loop()
        await self._server.shutdown(sockets=[listener])

    def stop_accepting(self) -> None:
        """Closes the listening socket; open connections go on."""
        for server in self._server.servers:
            server.close()

    async def close(self, timeout_s: float) -> None:
        """Lets responses end for timeout_s, then cuts them."""
        self._server.config.timeout_graceful_shutdown = max(1, int(timeout_s))
        self._server.should_exit = True
        await asyncio.wait((self._task,), timeout=timeout_s + 1)


def _limited_protocol(max_head_bytes: int) -> type[asyncio.Protocol]:
    class LimitedProtocol(HttpToolsProtocol):
        """HTTP/1.1 with a bound on what is kept of a request's head, and on the time it takes to arrive.

        The parser keeps a header until it is complete, before the routes see anything of it.
        """

        _head_bytes = 0
        _is_in_head = True
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, transport.close)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self._is_in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._is_in_head and self._head_bytes > max_head_bytes and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()

        def on_message_begin(self) -> None:
            self._is_in_head = True
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._is_in_head, self._head_bytes = False, 0
            self._stop_head_timer()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head_timer()
            super().connection_lost(exc)

        def _stop_head_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return LimitedProtocol
