"""The two receiving ends of a request's tokens: one writes them to a stream, one keeps them for a whole answer."""

import time
from collections.abc import Sequence

from serve_app.api.backend import Started
from serve_app.api.frames import FrameEncoder
from serve_app.api.responses import Tally
from serve_app.api.stream import SseWriter
from serve_app.messages import TokenDelta
from serve_app.metrics import HttpMetrics


class Clock:
    """When a request came and when its tokens did, on the monotonic clock; all its prompts together."""

    __slots__ = ("_metrics", "arrived", "first_token", "last_token")

    def __init__(self, metrics: HttpMetrics, arrived: float) -> None:
        self._metrics = metrics
        self.arrived = arrived
        self.first_token: float | None = None
        self.last_token = arrived

    def note(self, deltas: Sequence[TokenDelta]) -> None:
        """Counts the time that the newest tokens took. Deltas of one call are taken as one interval."""
        num_tokens = max([len(delta.token_ids) for delta in deltas], default=0)
        if not num_tokens:
            return
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now
            self._metrics.first_token.observe(now - self.arrived)
        else:
            self._metrics.inter_token.observe((now - self.last_token) / num_tokens, num_tokens)
        self.last_token = now


class StreamSink:
    """Encodes deltas and writes them at once."""

    def __init__(self, tally: Tally, encoder: FrameEncoder, writer: SseWriter, clock: Clock) -> None:
        self._tally = tally
        self._encoder = encoder
        self._writer = writer
        self._clock = clock

    def begin(self, started: Started) -> None:
        self._tally.begin(started)

    def push(self, deltas: Sequence[TokenDelta]) -> None:
        self._clock.note(deltas)
        encode, add = self._encoder.encode, self._tally.add
        frames = []
        for delta in deltas:
            add(delta)
            frames.append(encode(delta))
        self._writer.write(frames[0] if len(frames) == 1 else b"".join(frames), len(frames))

    @property
    def backlog(self) -> int:
        return self._writer.backlog


class WholeSink:
    """Keeps everything until the end."""

    def __init__(self, tally: Tally, clock: Clock) -> None:
        self._tally = tally
        self._clock = clock

    def begin(self, started: Started) -> None:
        self._tally.begin(started)

    def push(self, deltas: Sequence[TokenDelta]) -> None:
        self._clock.note(deltas)
        for delta in deltas:
            self._tally.add(delta)

    @property
    def backlog(self) -> int:
        return 0
