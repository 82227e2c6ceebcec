"""Which tokens may come next: the border to grammars."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TokenMask(Protocol):
    """The automaton of one choice. Lives on the host; the sampler holds the packed masks of all rows."""

    def advance(self, token_id: int) -> None:
        """Accepts the token that was drawn."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Takes back the last num_tokens accepted tokens (rejected drafts)."""
        ...

    def fill(self, row: NDArray[np.int32]) -> None:
        """Writes the next token's mask into row [ceil(vocab_size / 32)]: bit i % 32 of word i // 32 allows id i."""
        ...

    def fork(self) -> "TokenMask":
        """An independent copy, for another choice of the same request."""
        ...
