"""What is said while a model is quantised at load."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0
"""Between two lines in the log."""


class LoadProgress(Protocol):
    """Who is told how far a model is. Tensors are those of the file, bytes are the source's."""

    def start(self, title: str, total_bytes: int) -> None:
        """A new task begins."""
        ...

    def advance(self, tensor: str, num_bytes: int) -> None:
        """So many more bytes are done, the last ones of this tensor."""
        ...

    def finish(self) -> None:
        """The task is done, also where fewer bytes than expected were."""
        ...


class LogProgress:
    """Lines in the log: tensor, share, speed, and the time that it still takes. Quick work has none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def start(self, title: str, total_bytes: int) -> None:
        """See LoadProgress."""
        self._title, self._total, self._done = title, max(1, total_bytes), 0
        self._started = self._told = self._clock()

    def advance(self, tensor: str, num_bytes: int) -> None:
        """See LoadProgress."""
        self._done += num_bytes
        now = self._clock()
        if now - self._told < LOG_SECONDS:
            return
        self._told = now
        speed = self._done / (now - self._started)
        logger.info(
            "%s: %d %% (%s), %.0f MB/s, %.0f s left",
            self._title, 100 * self._done // self._total, tensor, speed / 1e6, (self._total - self._done) / speed,
        )  # fmt: skip

    def finish(self) -> None:
        """See LoadProgress."""
