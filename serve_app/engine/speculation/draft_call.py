"""What a target asks of a draft model, and what it gets. Plain data without torch."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class SamplingChain:
    """How a draft samples: see SamplingParams; temperature is above 0."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


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
    chain: SamplingChain | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SampledTokens(Sequence[int]):
    """Tokens that a draft sampled, with what from: a sequence of n ids whose slices keep their rows.

    candidates [n, K] int32: the ids that each could have been, chances [n, K] float32: how likely each was, q; a row's
    sum is 1. Ids with the chance 0 may stand there more than once. Whether there is a place must not hang on what was
    sampled for it: it would not be of the law q any more.
    """

    token_ids: list[int]
    candidates: NDArray[np.int32]
    chances: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.token_ids)

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> "SampledTokens": ...

    def __getitem__(self, index: SupportsIndex | slice) -> "int | SampledTokens":
        if isinstance(index, slice):
            return SampledTokens(self.token_ids[index], self.candidates[index], self.chances[index])
        return self.token_ids[index]


Draft = list[int] | SampledTokens
"""Tokens that may follow."""
Drafted = Draft | None
"""None: the sequence is not known up to its base, and is to be told from its beginning."""


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
