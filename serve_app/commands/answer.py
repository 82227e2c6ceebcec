"""One answer of the engine, as text that arrives bit by bit in the caller's thread."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from types import FrameType
from typing import Protocol

from serve_app.errors import ServeError
from serve_app.messages import Finish, GenerateRequest, TokenDelta


class AnsweringEngine(Protocol):
    """What is asked of engine.engine.Engine here."""

    def add(self, source: GenerateRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...


@dataclass(slots=True)
class Answer:
    """How an answer went; filled in while it is read."""

    text: str = ""
    num_tokens: int = 0
    seconds: float = 0.0
    was_stopped: bool = False
    finish: Finish | None = None
    error: ServeError | None = None


# In the queue: what the engine's thread brings, or None for a Ctrl-C.
Events = SimpleQueue[list[TokenDelta] | None]


def stream(engine: AnsweringEngine, events: Events, request: GenerateRequest, answer: Answer) -> Iterator[str]:
    """Runs a request and yields its text; Ctrl-C aborts the request, not the program.

    events is the queue that the engine's on_deltas fills. Raises the ServeError with which add refuses the request;
    one that ends it later is left in answer.error.
    """
    start = time.perf_counter()
    # SimpleQueue.put may be called in a signal handler, whatever the queue is doing at that moment.
    with on_interrupt(lambda number, frame: events.put(None)):
        engine.add(request)
        while answer.finish is None:
            deltas = events.get()
            if deltas is None:
                answer.was_stopped = True
                engine.abort(request.request_id)
                continue
            for delta in deltas:
                if delta.request_id != request.request_id:
                    continue
                answer.text += delta.text
                answer.num_tokens += len(delta.token_ids)
                answer.finish = delta.finish
                if delta.text:
                    yield delta.text
    answer.seconds = time.perf_counter() - start
    answer.error = answer.finish.error


@contextmanager
def on_interrupt(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    """What Ctrl-C does inside of the block."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
