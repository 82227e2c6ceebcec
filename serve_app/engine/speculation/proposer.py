"""What proposes the tokens that a target is likely to draw next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from serve_app.engine.speculation.draft_call import Draft, SamplingChain


def no_work() -> None:
    """Nothing."""


@dataclass(slots=True)
class DraftWish:
    """What is wanted for one sequence in one step.

    sequence: its number, which no other sequence ever has. token_ids: all of it that is known, num_prompt of them the
    prompt; only to be read, and only during the call. max_tokens: how many tokens to propose at most, 1 or more.
    chain: the target can verify tokens that were sampled so, if they come with their chances; None: it cannot.
    """

    sequence: int
    token_ids: list[int]
    num_prompt: int
    max_tokens: int
    chain: SamplingChain | None = None


class Proposer(Protocol):
    """Proposes continuations; what it says is never trusted, only compared with what the target draws, unless it is
    SampledTokens: a text has the target's law only if these were sampled as they say.

    All calls come from the engine's stepping thread. None raises, and none blocks longer than the proposer's deadline:
    a proposer that cannot answer proposes nothing.
    """

    @property
    def name(self) -> str:
        """draft, ngram or suffix."""

    @property
    def is_open(self) -> bool:
        """Whether there is anybody to ask now."""

    @property
    def num_timeouts(self) -> int:
        """Steps for which proposals did not come in time."""

    def admit(self, sequence: int, token_ids: Sequence[int], scope: bytes = b"") -> None:
        """A sequence was admitted with this prompt: its first wish comes when the target has computed that.

        scope: nothing that it says may be seen from sequences of another one (the salt of a tenant's cache).
        """

    def propose(self, wishes: Sequence[DraftWish], meanwhile: Callable[[], None] = no_work) -> Sequence[Draft]:
        """For each wish at most max_tokens token ids that may follow, possibly none. meanwhile: what else is to be done
        in any case; a proposer that waits for another process calls it, unless the answer comes at once."""

    def forget(self, sequence: int, token_ids: Sequence[int] = ()) -> None:
        """The sequence ended, token_ids are all of it; there may never have been a wish for it."""

    def close(self) -> None:
        """Frees what it holds."""
