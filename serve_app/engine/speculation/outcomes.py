"""A small cache of what a draft will be asked next if its answer is not accepted as a whole."""

from collections.abc import Iterable, Sequence

from serve_app.engine.speculation.draft_sequence import DraftSequence
from serve_app.kv_cache.block_ledger import BlockLedger
from serve_app.kv_cache.kv_pool import KvPool
from serve_app.layers.angle_sets import AngleSets

MOST_OUTCOMES = 3
"""Of one answer."""
LEAST_CHANCE = 0.02
"""An outcome that is less likely, by the draft's own chances, is not worth a row of a forward."""


class Outcomes:
    """Outcomes of answers: the tokens before a place are accepted, and there the target draws what the draft finds
    second likeliest. Each is a DraftSequence of its own, which shares the full blocks before that place.

    They are made behind an answer and end with the next call of their sequence, which becomes one of them where the
    target has drawn just that: its proposal is there then. The likeliest outcome of all, that everything is accepted,
    needs nothing of this: the sequence itself goes on.
    """

    def __init__(self, pool: BlockLedger, kv: KvPool) -> None:
        self._pool = pool
        self._kv = kv
        self.num_adopted = 0

    def expect(
        self, answered: Iterable[tuple[DraftSequence, int]], angles: AngleSets, longest: int, most: int
    ) -> list[DraftSequence]:
        """The likeliest outcomes, at most so many, of sequences to which so many tokens were answered; those that are
        new take blocks if there are any. longest: tokens that a sequence may have."""
        found = []
        for sequence, count in answered:
            length = sequence.num_text + count + 1 + sequence.max_tokens
            if length > longest or (sequence.angles is not None and angles.is_outgrown(sequence.angles, length)):
                continue
            found += [(chance, sequence, place, token_id) for chance, place, token_id in _likeliest(sequence, count)]
        found.sort(key=lambda outcome: -outcome[0])
        outcomes = []
        for _, sequence, place, token_id in found[:most]:
            outcome = sequence.outcomes.get((place, token_id)) or self._branch(sequence, place, token_id, angles)
            if outcome is not None:
                outcomes.append(outcome)
        return outcomes

    def settle(self, sequence: DraftSequence, base: int, token_ids: Sequence[int], angles: AngleSets) -> None:
        """The sequence is told tokens behind the first `base` of its text: it becomes the outcome that they are, if
        that was foreseen, and all others end."""
        end = base + len(token_ids)
        for outcome in list(sequence.outcomes.values()):
            if base <= sequence.num_text < end == outcome.num_text and outcome.ids[base:end] == token_ids:
                sequence.become(outcome)
                self.num_adopted += 1
        self.drop(sequence, angles)

    def drop(self, sequence: DraftSequence, angles: AngleSets) -> None:
        """Ends all outcomes of a sequence."""
        for outcome in sequence.outcomes.values():
            self._pool.release(outcome.blocks)
            if outcome.angles is not None:
                angles.give_back(outcome.angles)
        sequence.outcomes.clear()

    def _branch(self, sequence: DraftSequence, place: int, token_id: int, angles: AngleSets) -> DraftSequence | None:
        num_computed = min(sequence.num_computed, place)
        num_full, num_beyond = divmod(num_computed, self._pool.block_size)
        own = self._pool.allocate(1) if num_beyond else []
        if own is None:
            return None
        shared = sequence.blocks[:num_full]
        for copy in own:
            self._kv.copy_block(sequence.blocks[num_full], copy)
        self._pool.fork(shared)
        if sequence.angles is not None:
            angles.share(sequence.angles)
        outcome = sequence.outcomes[place, token_id] = DraftSequence(
            ids=[*sequence.ids[:place], token_id],
            num_text=place + 1,
            num_computed=num_computed,
            blocks=[*shared, *own],
            angles=sequence.angles,
            num_prompt=sequence.num_prompt,
            max_tokens=sequence.max_tokens,
            last_call=sequence.last_call,
        )
        return outcome


def _likeliest(sequence: DraftSequence, count: int) -> list[tuple[float, int, int]]:
    """(chance, place in the text, token id) of outcomes of an answer of count tokens; the place behind it is drawn,
    too."""
    found, before = [], 1.0
    for i, (chance, other) in enumerate(zip(sequence.chances[: count + 1], sequence.others, strict=False)):
        if other is not None and before * other[1] >= LEAST_CHANCE:
            found.append((before * other[1], sequence.num_text + i, other[0]))
        before *= chance
    return sorted(found, reverse=True)[:MOST_OUTCOMES]
