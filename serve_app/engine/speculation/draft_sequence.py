"""What a draft model knows of one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.layers.angle_sets import AngleSet


@dataclass(slots=True, eq=False)
class DraftSequence:
    """The target's text, and how the draft would go on.

    ids: the num_text known tokens, then those drafted; chances: the draft's probability of each of the latter.
    num_prompt: tokens when they were first computed.
    num_computed: tokens whose K and V are in blocks, always fewer than ids where anything was drafted. max_tokens: of
    the last call, 0 before the first. last_call: its number.
    """

    ids: list[int] = field(default_factory=list)
    num_text: int = 0
    chances: list[float] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    angles: AngleSet | None = None
    num_prompt: int = 0
    max_tokens: int = 0
    last_call: int = 0

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
            self.chances.clear()
            self.num_computed = min(self.num_computed, common, max(0, len(self.ids) - 1))
        else:
            del self.chances[: end - self.num_text]
        self.num_text = end
        return True

    def draw(self, token_id: int, chance: float) -> None:
        """Adds a drafted token."""
        self.ids.append(token_id)
        self.chances.append(chance)

    def drafted(self, max_tokens: int, least_chance: float) -> list[int]:
        """The first tokens of the draft, up to one that is unlikely."""
        count = next((i for i, p in enumerate(self.chances[:max_tokens]) if p < least_chance), max_tokens)
        return self.ids[self.num_text : self.num_text + count]

    def is_drafted(self, first: int, max_tokens: int, least_chance: float) -> bool:
        """Whether max_tokens are drafted from the first one on, or else one of them is unlikely."""
        chances = self.chances[first : first + max_tokens]
        return len(chances) == max_tokens or any(p < least_chance for p in chances)

    def reset(self) -> None:
        """Nothing is computed any more; the text stays."""
        del self.ids[self.num_text :]
        self.chances.clear()
        self.num_computed = 0
