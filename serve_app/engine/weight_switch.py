"""How other weights come into a running engine, as those see it who ask for it. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from serve_app.options import IsqOptions

Mode = Literal["drain", "swap"]
"""drain: requests that run end on the old weights, new ones wait. swap: what runs is computed again by the new ones."""

Progress = Callable[[float], None]
"""Told how much is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class SwitchPlan:
    """How weights of a type can be made.

    isq_type, from_type: the names of that type and of the one in use. in_place: the weights in use must go before those
    are made, so what runs must end first. needed: bytes, while they are made. free: this process's share of the memory.
    source: bytes that are read.
    """

    isq_type: str
    from_type: str
    isq: IsqOptions | None
    in_place: bool
    needed: int
    free: int
    source: int


class WeightSwitch(Protocol):
    """plan, prepare and switch, in this order, then settle, or at any time stop and undo: one caller at a time.

    Until settle, the old weights are kept for undo, or the way to make them again. No request is lost by any of it.
    """

    @property
    def isq_type(self) -> str:
        """The type of the weights in use."""

    def plan(self, isq_type: str | int, num_sharing: int = 1) -> SwitchPlan:
        """num_sharing: how many processes make weights at the same time in this machine's memory, this one included.

        Raises InvalidRequest, with the list of types, for a bad one; Conflict where the model's files are gone or
        others, or memory does not suffice, with the bytes."""

    def prepare(self, plan: SwitchPlan, progress: Progress) -> None:
        """Makes the new weights beside the running engine; nothing to do where they take the place of the old ones."""

    def switch(self, mode: Mode) -> None:
        """Exchanges the weights. After an error the old ones are in use."""

    def settle(self) -> None:
        """Gives up the old weights."""

    def stop(self) -> None:
        """Ends a prepare or switch that runs in another thread, which then raises, if it has not come too far."""

    def undo(self) -> None:
        """Drops what is prepared, or puts the old weights back; requests that run are computed again by them."""
