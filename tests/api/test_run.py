"""Clients that leave, clients that do not read, and clocks that run out, over a real server."""

import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"


def _open(server: Any, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def _wait(condition: Any, timeout_s: float = 5.0) -> float:
    """The time at which the condition became true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.002)
    return time.monotonic()


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"stream": True, "n": 4}])
def test_a_client_that_leaves_aborts_its_request_within_100_ms(serve, backend, body):
    backend.length, backend.step_s = 10_000, 0.002
    server = serve(backend)
    delays = []
    for _ in range(20):
        backend.aborted.clear()
        connection = _open(server, {"messages": "hi", **body})
        if body["stream"]:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            _wait(lambda: backend.num_live == 1)
        left = time.monotonic()
        connection.close()
        _wait(lambda: backend.aborted)
        delays.append(next(iter(backend.aborted.values())) - left)
        _wait(lambda: backend.num_live == 0)
    delays.sort()
    assert delays[18] < 0.1
    assert backend.http_metrics.disconnects == {"client left": 20}
    _wait(lambda: backend.http_metrics.in_flight == 0)


def test_a_client_that_leaves_while_queued_aborts_too(serve, backend):
    backend.step_s = 60
    server = serve(backend)
    for stream in (True, False):
        connection = _open(server, {"messages": "hi", "stream": stream})
        _wait(lambda: backend.num_live == 1)
        connection.close()
        _wait(lambda: backend.num_live == 0)


def test_prompts_of_one_request_are_aborted_together(serve, backend):
    backend.length, backend.step_s = 10_000, 0.002
    server = serve(backend)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={"prompt": ["a", "b", "c"], "stream": True}
    ) as reply:
        # Held by a name: an iterator that is let go closes the response.
        parts = reply.iter_raw()
        next(parts)
        assert backend.num_live == 3
    _wait(lambda: backend.num_live == 0)
    assert len(backend.aborted) == 3


def test_a_client_that_does_not_read_slows_nobody_and_stays_bounded(serve, backend):
    backend.length, backend.step_s, backend.words = 3000, 0.001, ("x" * 2000,)
    server = serve(backend)
    lazy = [_open(server, {"messages": "hi", "stream": True}, receive_buffer=4096) for _ in range(4)]
    # With 4 KiB of receive buffer, the server's socket and transport buffers are full after some megabytes.
    _wait(lambda: backend.max_backlog > backend.credit, 20)
    began = time.monotonic()
    reader = server.client().chat.completions.create(model="x", messages="hi", stream=True, max_tokens=300)
    gaps, last = [], began
    for _ in reader:
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    gaps.sort()
    assert len(gaps) == 302
    assert gaps[int(len(gaps) * 0.99)] < 0.1
    assert backend.max_backlog <= backend.credit + 1
    assert backend.num_live == 4
    for connection in lazy:
        connection.close()
    _wait(lambda: backend.num_live == 0)


def test_a_slow_client_gets_everything_in_order(serve, backend):
    backend.length, backend.step_s = 2000, 0
    backend.words = tuple(f"{i}:" + "x" * 3000 for i in range(2000))
    server = serve(backend)
    connection = _open(server, {"messages": "hi", "stream": True}, receive_buffer=4096)
    _wait(lambda: backend.max_backlog > backend.credit, 20)
    data = b""
    while b"[DONE]" not in data[-200:]:
        data += connection.recv(1 << 20)
    connection.close()
    texts = [json.loads(line[6:]) for line in _unchunked(data).split(b"\n\n") if line.startswith(b"data: {")]
    content = [event["choices"][0]["delta"].get("content") for event in texts]
    assert [text for text in content if text] == list(backend.words)


def test_a_client_that_never_reads_is_dropped(serve, backend):
    backend.length, backend.step_s, backend.words = 10**6, 0, ("x" * 5000,)
    server = serve(backend, slow_client_timeout_s=0.3)
    connection = _open(server, {"messages": "hi", "stream": True}, receive_buffer=4096)
    _wait(lambda: backend.aborted, 20)
    _wait(lambda: backend.http_metrics.disconnects["client too slow"] == 1)
    assert backend.num_live == 0
    connection.close()


def test_a_backlog_over_its_bound_drops_the_client(serve, backend):
    # A pump that ignores the backlog must not fill the memory.
    backend.length, backend.step_s, backend.words, backend.credit = 10**6, 0, ("x" * 5000,), 10**9
    server = serve(backend, max_stream_backlog=100)
    connection = _open(server, {"messages": "hi", "stream": True}, receive_buffer=4096)
    _wait(lambda: backend.aborted, 20)
    _wait(lambda: backend.http_metrics.disconnects["client too slow"] == 1)
    assert backend.max_backlog <= 101
    connection.close()


def test_a_request_that_waits_too_long_gets_503(serve, backend):
    backend.step_s = 60
    server = serve(backend, first_token_timeout_s=0.2)
    for stream in (False, True):
        reply = httpx.post(server.url + CHAT, json={"messages": "hi", "stream": stream})
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert "first token" in reply.json()["error"]["message"]
    assert backend.num_live == 0


def test_a_stream_that_falls_silent_ends_with_an_error_event(serve, backend):
    backend.length = 100
    server = serve(backend, idle_stream_timeout_s=0.2)
    with httpx.stream("POST", server.url + CHAT, json={"messages": "hi", "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        backend.step_s = 60
        last = [line for line in lines if line][-1]
    assert "next token" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert backend.num_live == 0


def test_a_silent_stream_is_kept_alive_by_comments(serve, backend):
    backend.step_s = 0.35
    server = serve(backend, keep_alive_s=0.1)
    text = httpx.post(server.url + CHAT, json={"messages": "hi", "stream": True, "max_tokens": 2}).text
    assert text.startswith(": keep-alive\n\n")
    assert text.count(": keep-alive") >= 4
    chunks = server.client().chat.completions.create(model="x", messages="hi", stream=True, max_tokens=2)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Once upon"


def test_stopping_the_server_ends_open_streams(serve, backend):
    backend.length, backend.step_s = 10_000, 0.01
    server = serve(backend)
    done = threading.Event()

    def read() -> None:
        with pytest.raises(httpx.TransportError):
            httpx.post(server.url + CHAT, json={"messages": "hi", "stream": True})
        done.set()

    thread = threading.Thread(target=read)
    thread.start()
    _wait(lambda: backend.num_live == 1)
    server.stop()
    assert done.wait(5)
    thread.join()
    assert backend.num_live == 0


def _unchunked(data: bytes) -> bytes:
    """The body of a chunked response, as far as it came."""
    _, _, rest = data.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length:
            break
        body += rest[:length]
        rest = rest[length + 2 :]
    return body
