"""What a draft model knows of one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serve_app.engine.speculation.draft_call import Draft, SampledTokens, SamplingChain
from serve_app.layers.angle_sets import AngleSet

DrawnFrom = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Candidates [K] and their chances [K], see SampledTokens."""


@dataclass(slots=True, eq=False)
class DraftSequence:
    """The target's text, and how the draft would go on.

    ids: the num_text known tokens, then those drafted; chances: the draft's probability of each of the latter, 1 for
    one that was sampled, and drawn_from: what from. others: the second likeliest token at each place and its chance,
    None where it is sampled. chain: how its tokens are sampled, None: the likeliest are taken. outcomes: see Outcomes.
    num_prompt: tokens when they were first computed.
    num_computed: tokens whose K and V are in blocks, always fewer than ids where anything was drafted. max_tokens: of
    the last call, 0 before the first. last_call: its number.
    """

    ids: list[int] = field(default_factory=list)
    num_text: int = 0
    chances: list[float] = field(default_factory=list)
    drawn_from: list[DrawnFrom] = field(default_factory=list)
    others: list[tuple[int, float] | None] = field(default_factory=list)
    chain: SamplingChain | None = None
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    angles: AngleSet | None = None
    num_prompt: int = 0
    max_tokens: int = 0
    last_call: int = 0
    outcomes: dict[tuple[int, int], "DraftSequence"] = field(default_factory=dict)

    def tell(self, base: int, token_ids: Sequence[int]) -> bool:
        """Puts tokens behind the first `base` of the text; what was drafted stays as far as it agrees. False, and
        nothing changed, where fewer are known."""
        if base > self.num_text:
            return False
        end = base + len(token_ids)
        if end < self.num_text or self.ids[base:end] != token_ids:
            common = base
            for mine, told in zip(self.ids[base:], token_ids, strict=False):
                if mine != told:
                    break
                common += 1
            self.ids[common:] = token_ids[common - base :]
            self._drop_chances()
            self.num_computed = min(self.num_computed, common, max(0, len(self.ids) - 1))
        else:
            del self.chances[: end - self.num_text]
            del self.drawn_from[: end - self.num_text]
            del self.others[: end - self.num_text]
        self.num_text = end
        return True

    def sample_by(self, chain: SamplingChain | None) -> None:
        """From here on its tokens are sampled so; what was drafted in another way goes."""
        if chain != self.chain:
            self.chain = chain
            del self.ids[self.num_text :]
            self._drop_chances()
            self.num_computed = min(self.num_computed, max(0, self.num_text - 1))

    def become(self, other: "DraftSequence") -> None:
        """Takes text, draft and blocks of another one, which gets these in return."""
        for name in ("ids", "num_text", "chances", "drawn_from", "others", "num_computed", "blocks"):
            mine, its = getattr(self, name), getattr(other, name)
            setattr(self, name, its)
            setattr(other, name, mine)

    def draw(self, token_id: int, chance: float, other: tuple[int, float] | None = None) -> None:
        """Adds a drafted token, the likeliest, and the one that comes after it."""
        self.ids.append(token_id)
        self.chances.append(chance)
        self.others.append(other)

    def draw_sampled(self, token_id: int, drawn_from: DrawnFrom) -> None:
        """Adds a token that was sampled. Unlikely or not, it is proposed: see SampledTokens."""
        self.draw(token_id, 1.0)
        self.drawn_from.append(drawn_from)

    def drafted(self, max_tokens: int, least_chance: float) -> Draft:
        """The first tokens of the draft, up to one that is unlikely."""
        count = self.num_drafted(max_tokens, least_chance)
        token_ids = self.ids[self.num_text : self.num_text + count]
        if not token_ids or self.chain is None:
            return token_ids
        candidates, chances = zip(*self.drawn_from[:count], strict=True)
        return SampledTokens(token_ids, np.stack(candidates), np.stack(chances))

    def num_drafted(self, max_tokens: int, least_chance: float) -> int:
        """How many these are."""
        chances = self.chances[:max_tokens]
        return next((i for i, p in enumerate(chances) if p < least_chance), len(chances))

    def is_drafted(self, first: int, max_tokens: int, least_chance: float) -> bool:
        """Whether max_tokens are drafted from the first one on, or else one of them is unlikely."""
        chances = self.chances[first : first + max_tokens]
        return len(chances) == max_tokens or any(p < least_chance for p in chances)

    def reset(self) -> None:
        """Nothing is computed any more; the text stays."""
        del self.ids[self.num_text :]
        self._drop_chances()
        self.num_computed = 0

    def _drop_chances(self) -> None:
        self.chances.clear()
        self.drawn_from.clear()
        self.others.clear()
