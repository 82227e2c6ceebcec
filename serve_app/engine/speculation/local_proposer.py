"""A draft model in the target's own process."""

from collections.abc import Callable, Sequence

from serve_app.engine.speculation.draft_call import Draft, DraftCall, DraftModel
from serve_app.engine.speculation.proposer import DraftWish, no_work


class LocalProposer:
    """See Proposer. The target waits while the model drafts, however long that takes: for engines run directly."""

    name = "draft"
    is_open = True
    num_timeouts = 0

    def __init__(self, drafter: DraftModel) -> None:
        """Owns the drafter."""
        self._drafter = drafter
        # Tokens of each sequence that the drafter was told.
        self._told: dict[int, int] = {}

    def admit(self, sequence: int, token_ids: Sequence[int], scope: bytes = b"") -> None:
        """See Proposer. The first call computes the prompt."""

    def propose(self, wishes: Sequence[DraftWish], meanwhile: Callable[[], None] = no_work) -> list[Draft]:
        """See Proposer."""
        answers = self._drafter.propose([self._call(wish) for wish in wishes])
        unknown = [i for i, drafted in enumerate(answers) if drafted is None]
        if unknown:
            for i in unknown:
                del self._told[wishes[i].sequence]
            again = self._drafter.propose([self._call(wishes[i]) for i in unknown])
            for i, drafted in zip(unknown, again, strict=True):
                answers[i] = drafted
        return [drafted or [] for drafted in answers]

    def forget(self, sequence: int, token_ids: Sequence[int] = ()) -> None:
        """See Proposer."""
        self._told.pop(sequence, None)
        self._drafter.forget(sequence)

    def close(self) -> None:
        """See Proposer."""
        self._drafter.close()

    def _call(self, wish: DraftWish) -> DraftCall:
        base = self._told.get(wish.sequence, 0)
        self._told[wish.sequence] = len(wish.token_ids)
        return DraftCall(wish.sequence, base, wish.token_ids[base:], wish.max_tokens, wish.chain)
