"""Where the weights of a draft model can be exchanged. No torch."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from serve_app.engine.weight_switch import WeightSwitch


class DraftBorder(Protocol):
    """The one thread that calls a draft model."""

    @property
    def is_failed(self) -> bool:
        """Whether it does not any more, or in vain."""

    def between_calls(self, run: Callable[[], None]) -> "Future[None]":
        """Has run called between two calls; the future, which can be cancelled before, has its exception."""

    def fail(self) -> None:
        """The draft model is of no use any more."""


MakeSwitch = Callable[[DraftBorder], WeightSwitch]
"""How the weights of a draft model can be changed, once there is a thread that calls it."""
