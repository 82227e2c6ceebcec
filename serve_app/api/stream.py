"""The writer of one event stream: frames go to the client from whoever brings them, without a task in between.

`write` drives the server's `send` by hand for one step. A client that keeps up takes the frame in that step, which is
all a token costs; for one that does not, a task finishes the step while later frames pile up, to a bound.
"""

import asyncio
import time
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from serve_app.api.error_shape import ClientGone

Send = Callable[[dict[str, Any]], Coroutine[Any, Any, None]]


def _start_message() -> dict[str, Any]:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        # nginx and its like would hold events back.
        (b"x-accel-buffering", b"no"),
    ]
    return {"type": "http.response.start", "status": 200, "headers": headers}


class SseWriter:
    """One response that streams events. Belongs to one event loop; the response starts with the first write.

    failed completes with ClientGone when the client cannot be written to or lets more than max_backlog deltas lie.
    """

    def __init__(self, send: Send, max_backlog: int) -> None:
        self._send = send
        self._max_backlog = max_backlog
        self._pending: list[bytes] = []
        self._slow: asyncio.Task[None] | None = None
        self._is_over = False
        self.backlog = 0
        self.has_started = False
        self.written_at = time.monotonic()
        self.stuck_since: float | None = None
        self.failed: asyncio.Future[ClientGone] = asyncio.get_running_loop().create_future()

    def write(self, data: bytes, num_deltas: int = 0) -> None:
        """Sends `data` now if the client keeps up, else queues it. Never blocks, never raises."""
        if self._is_over or not data:
            return
        if self._slow is not None:
            self._queue(data, num_deltas)
            return
        if self.has_started:
            step = self._send({"type": "http.response.body", "body": data, "more_body": True})
        else:
            self.has_started = True
            step = self._start(data)
        self.written_at = time.monotonic()
        try:
            awaited = step.send(None)
        except StopIteration:
            return
        except Exception as error:
            self._fail(f"the connection broke: {type(error).__name__}")
            return
        self.backlog += num_deltas
        self.stuck_since = self.written_at
        self._slow = asyncio.get_running_loop().create_task(self._catch_up(step, awaited, num_deltas))

    async def end(self, data: bytes) -> None:
        """Writes what is left and `data`, and closes the response. Raises ClientGone if the client is not there."""
        while self._slow is not None and not self._is_over:
            waiting: set[asyncio.Future[Any]] = {self._slow, self.failed}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self.failed.done():
            raise self.failed.result()
        self._is_over = True
        if not self.has_started:
            self.has_started = True
            await self._send(_start_message())
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def close(self) -> None:
        """Ends the writer whatever its state; for after the response, or when nobody reads it."""
        self._is_over = True
        self._pending.clear()
        self.backlog = 0
        if self._slow is not None:
            self._slow.cancel()
            await asyncio.gather(self._slow, return_exceptions=True)
        self.failed.cancel()

    def _queue(self, data: bytes, num_deltas: int) -> None:
        self._pending.append(data)
        self.backlog += num_deltas
        if self.backlog > self._max_backlog:
            self._fail("client too slow")

    async def _start(self, data: bytes) -> None:
        await self._send(_start_message())
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _catch_up(self, step: Coroutine[Any, Any, None], awaited: Any, num_deltas: int) -> None:
        """Finishes the step that did not complete, then sends what has piled up, joined, until nothing is left."""
        try:
            await _resume(step, awaited)
            while True:
                self.backlog -= num_deltas
                self.written_at = time.monotonic()
                if not self._pending:
                    break
                self.stuck_since = self.written_at
                data, num_deltas = b"".join(self._pending), self.backlog
                self._pending.clear()
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            self._fail(f"the connection broke: {type(error).__name__}")
        finally:
            self.stuck_since = None
            self._slow = None

    def _fail(self, reason: str) -> None:
        self._is_over = True
        self._pending.clear()
        if not self.failed.done():
            self.failed.set_result(ClientGone(reason))


@types.coroutine
def _resume(step: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """Carries on, inside a task, a coroutine that was started by hand and stopped at `awaited`."""
    try:
        while True:
            try:
                value = yield awaited
            except BaseException as error:
                awaited = step.throw(error)
            else:
                awaited = step.send(value)
    except StopIteration:
        return
