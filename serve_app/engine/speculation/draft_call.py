"""What a target asks of a draft model. Plain data without torch."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class DraftCall:
    """A wish for one sequence, as what changed since the last one.

    sequence: what no other sequence of the drafter is called. base: how many of its tokens the caller has told before
    and that still hold; token_ids: those that follow, the last of them the last one known. max_tokens: to propose at
    most.
    """

    sequence: Hashable
    base: int
    token_ids: Sequence[int]
    max_tokens: int


Drafted = list[int] | None
"""The tokens that may follow; None: the sequence is not known up to its base, and is to be told from its beginning."""


class DraftModel(Protocol):
    """Drafts for many sequences; all calls on one thread. What it has forgotten can always be told again."""

    def propose(self, calls: Sequence[DraftCall], until_s: float | None = None) -> list[Drafted]:
        """An answer to each call. until_s: time.monotonic() after which nothing more is begun; None: no limit."""
        ...

    def feed(self, sequence: Hashable, token_ids: Sequence[int], offset: int) -> None:
        """Tells tokens of a sequence from a place on, to be computed when there is time; dropped where those before
        them are not known."""
        ...

    def advance(self) -> bool:
        """Does one forward of what will be useful later; False: there is none."""
        ...

    def forget(self, sequence: Hashable) -> None:
        """Drops a sequence, known or not."""
        ...

    def close(self) -> None:
        """Frees model and cache."""
        ...
