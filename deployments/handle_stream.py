"""The token path without a pump: one stream of Serve's per request, several times dearer, through any network."""

import asyncio
from collections.abc import AsyncIterator, Callable

from deployments.token_pump import CREDIT_WINDOW
from serve_app.messages import TokenDelta


class HandleStreams:
    """Queues of deltas, one a request, filled from the engine's thread and read by Serve's streaming calls.

    pause and resume are called with a request id when its reader falls behind by `window` deltas, and has caught up.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        pause: Callable[[str], None],
        resume: Callable[[str], None],
        window: int = CREDIT_WINDOW,
    ) -> None:
        self._loop = loop
        self._pause = pause
        self._resume = resume
        self._window = window
        self._queues: dict[str, asyncio.Queue[TokenDelta]] = {}

    def open(self, request_id: str) -> None:
        """Announces a request before its first delta."""
        self._queues[request_id] = asyncio.Queue()

    def close(self, request_id: str) -> None:
        self._queues.pop(request_id, None)

    def publish(self, deltas: list[TokenDelta]) -> None:
        """Takes one step's deltas, on the engine's thread; those of unknown requests are dropped."""
        if self._queues:
            self._loop.call_soon_threadsafe(self._spread, deltas)

    async def read(self, request_id: str, num_choices: int) -> AsyncIterator[list[TokenDelta]]:
        """The request's deltas, all that wait at a time, to its last choice's finish.

        Raises the ServeError that ended the request.
        """
        queue = self._queues[request_id]
        num_open = num_choices
        is_paused = False
        while num_open > 0:
            deltas = [await queue.get()]
            while not queue.empty():
                deltas.append(queue.get_nowait())
            for delta in deltas:
                if delta.finish is not None:
                    if delta.finish.error is not None:
                        raise delta.finish.error
                    num_open -= 1
            is_paused = is_paused or len(deltas) >= self._window
            yield deltas
            if is_paused and queue.qsize() < self._window // 2:
                is_paused = False
                self._resume(request_id)

    def _spread(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            queue = self._queues.get(delta.request_id)
            if queue is not None:
                queue.put_nowait(delta)
                if queue.qsize() == self._window:
                    self._pause(delta.request_id)
