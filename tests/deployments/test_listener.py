"""The ingress replica's own HTTP server, over loopback."""

import asyncio
import contextlib
import socket

import pytest

from deployments import listener
from deployments.edge import reserve_port
from deployments.listener import Listener, bind
from serve_app.errors import LaunchError
from tests.server_process import free_port


async def application(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Served:
    def __init__(self, app=application) -> None:
        self.socket = bind("127.0.0.1", 0, is_shared=False)
        self.port = self.socket.getsockname()[1]
        self.listener = Listener(app, self.socket, max_header_bytes=4096)

    async def __aenter__(self) -> "Served":
        await asyncio.sleep(0.05)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.listener.close(1)

    async def ask(self, *pieces: bytes, pause_s: float = 0.0) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_s)
            return await asyncio.wait_for(reader.read(65536), 5)
        except ConnectionError:
            return b""
        finally:
            writer.close()


async def test_it_answers_and_names_no_software():
    async with Served() as served:
        answer = await served.ask(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"ok")
    assert b"server:" not in answer.lower()


async def test_a_head_without_end_is_cut():
    async with Served() as served:
        answer = await served.ask(b"GET / HTTP/1.1\r\nHost: x\r\nX: ", *[b"a" * 4096] * 4)
    assert answer.startswith(b"HTTP/1.1 431") or answer == b""


async def test_a_head_that_takes_too_long_is_cut(monkeypatch):
    monkeypatch.setattr(listener, "HEAD_TIMEOUT_S", 0.1)
    async with Served() as served:
        assert await served.ask(b"GET / HTTP/1.1\r\nHo") == b""


async def test_a_body_larger_than_the_head_limit_is_no_head():
    async def reads_all(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await application(scope, receive_nothing, send)

    async def receive_nothing():
        return None

    body = b"x" * 100_000
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with Served(reads_all) as served:
        assert (await served.ask(head + body)).startswith(b"HTTP/1.1 200")


async def test_a_second_request_on_a_connection_is_bounded_too():
    async with Served() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        for _ in range(6):
            writer.write(b"GET / HTTP/1.1\r\nX: " + b"a" * 4096)
            await asyncio.sleep(0.01)
        rest = b""
        with contextlib.suppress(ConnectionError):
            rest = await asyncio.wait_for(reader.read(), 5)
        assert b"200 OK" not in rest
        writer.close()


async def test_closing_lets_an_open_response_end():
    release = asyncio.Event()

    async def slow(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begin", "more_body": True})
        await release.wait()
        await send({"type": "http.response.body", "body": b"end"})

    async with Served(slow) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"begin")
        closing = asyncio.create_task(served.listener.close(3))
        await asyncio.sleep(0.3)
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", served.port)
        release.set()
        assert b"end" in await asyncio.wait_for(reader.read(), 5)
        await closing
        writer.close()


def test_a_taken_port_is_one_sentence():
    with bind("127.0.0.1", 0, is_shared=False) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"cannot listen on 127.0.0.1:{port}.*--port"):
            reserve_port("127.0.0.1", port)
    reserve_port("127.0.0.1", port).close()


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_reserved_port_is_for_the_listener_alone(is_shared: bool) -> None:
    port = free_port()
    with reserve_port("127.0.0.1", port):
        with socket.socket() as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError, match="in use"):
                stranger.bind(("127.0.0.1", port))
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", port))
        with bind("127.0.0.1", port, is_shared=is_shared), socket.socket() as client:
            client.connect(("127.0.0.1", port))


def test_an_unknown_host_is_one_sentence(monkeypatch):
    def fails(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    with pytest.raises(LaunchError, match=r"host nowhere .--host. is not known"):
        reserve_port("nowhere", 1)


def test_replicas_can_share_a_port_and_strangers_cannot():
    with bind("127.0.0.1", 0, is_shared=True) as first:
        port = first.getsockname()[1]
        bind("127.0.0.1", port, is_shared=True).close()
        with pytest.raises(OSError, match="in use"), socket.socket() as stranger:
            stranger.bind(("127.0.0.1", port))
