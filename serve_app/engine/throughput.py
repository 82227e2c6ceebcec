"""How fast requests finish, to tell a client when to come back."""

import time
from collections import deque

MIN_WAIT_S = 1.0
MAX_WAIT_S = 120.0


class DrainRate:
    """The rate of the last finished requests."""

    def __init__(self, window: int = 64) -> None:
        self._times_s: deque[float] = deque(maxlen=window)

    def count(self) -> None:
        """Notes that a request finished now."""
        self._times_s.append(time.monotonic())

    def time_to_drain_s(self, num_requests: int) -> float:
        """How long num_requests take at the recent rate, in seconds, within sensible bounds."""
        times = list(self._times_s)
        if len(times) < 2:
            return MIN_WAIT_S
        per_request_s = (time.monotonic() - times[0]) / len(times)
        return min(max(num_requests * per_request_s, MIN_WAIT_S), MAX_WAIT_S)
