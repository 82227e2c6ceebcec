"""The writer alone, with a `send` that the test controls."""

import asyncio
from typing import Any

import pytest

from serve_app.api.error_shape import ClientGone
from serve_app.api.stream import SseWriter


class Gate:
    """A server's send that can be held up, as uvicorn's is while its socket is full."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.messages: list[dict[str, Any]] = []
        self.error: Exception | None = None

    async def send(self, message: dict[str, Any]) -> None:
        await self.open.wait()
        if self.error is not None:
            raise self.error
        self.messages.append(message)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.messages if message["type"] == "http.response.body"]


@pytest.fixture
async def gate() -> Gate:
    return Gate()


async def test_a_frame_is_out_before_write_returns(gate):
    writer = SseWriter(gate.send, 10)
    writer.write(b"a", 1)
    writer.write(b"b", 1)
    assert gate.bodies == [b"a", b"b"]
    assert gate.messages[0]["status"] == 200
    assert writer.backlog == 0
    await writer.end(b"z")
    assert gate.messages[-1] == {"type": "http.response.body", "body": b"z", "more_body": False}
    assert len(asyncio.all_tasks()) == 1
    await writer.close()


async def test_frames_pile_up_behind_a_full_socket_and_leave_joined(gate):
    writer = SseWriter(gate.send, 10)
    writer.write(b"a", 1)
    gate.open.clear()
    for frame in (b"b", b"c", b"d"):
        writer.write(frame, 1)
    assert (writer.backlog, gate.bodies) == (3, [b"a"])
    assert writer.stuck_since is not None
    gate.open.set()
    await asyncio.sleep(0.01)
    assert (writer.backlog, gate.bodies) == (0, [b"a", b"b", b"cd"])
    assert writer.stuck_since is None
    writer.write(b"e", 1)
    assert gate.bodies[-1] == b"e"
    await writer.close()


async def test_the_first_write_may_be_held_up_too(gate):
    gate.open.clear()
    writer = SseWriter(gate.send, 10)
    writer.write(b"a", 1)
    writer.write(b"b", 1)
    end = asyncio.create_task(writer.end(b"z"))
    await asyncio.sleep(0.01)
    assert not end.done()
    gate.open.set()
    await end
    assert [message["type"] for message in gate.messages[:2]] == ["http.response.start", "http.response.body"]
    assert b"".join(gate.bodies) == b"abz"
    await writer.close()


async def test_over_the_bound_the_client_is_given_up(gate):
    gate.open.clear()
    writer = SseWriter(gate.send, 3)
    for _ in range(10):
        writer.write(b"x", 1)
    assert isinstance(writer.failed.result(), ClientGone)
    with pytest.raises(ClientGone, match="too slow"):
        await writer.end(b"z")
    await writer.close()
    assert gate.messages == []


@pytest.mark.parametrize("is_slow", [False, True])
async def test_a_broken_connection_is_told_and_never_raised_by_write(gate, is_slow):
    writer = SseWriter(gate.send, 10)
    gate.error = OSError("gone")
    if is_slow:
        gate.open.clear()
    writer.write(b"a", 1)
    gate.open.set()
    await asyncio.sleep(0.01)
    writer.write(b"b", 1)
    with pytest.raises(ClientGone, match="OSError"):
        await writer.end(b"z")
    await writer.close()


async def test_closing_a_held_up_writer_leaves_no_task(gate):
    gate.open.clear()
    writer = SseWriter(gate.send, 10)
    writer.write(b"a", 1)
    await writer.close()
    assert len(asyncio.all_tasks()) == 1
    writer.write(b"b", 1)
    assert gate.messages == []


async def test_an_empty_stream_still_starts_and_ends(gate):
    writer = SseWriter(gate.send, 10)
    writer.write(b"", 1)
    assert gate.messages == []
    await writer.end(b"z")
    assert [message["type"] for message in gate.messages] == ["http.response.start", "http.response.body"]
    await writer.close()
