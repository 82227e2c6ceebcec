"""The free queue: blank blocks in front, then released prompts' blocks, least recently released first."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class ReleasedPrompt:
    """The free blocks that one released request left in the prefix cache."""

    __slots__ = ("blocks", "space")

    def __init__(self, space: "Space", blocks: Iterable[int]) -> None:
        self.space = space
        self.blocks = dict.fromkeys(blocks)


class Space:
    """What clients of one fingerprint share: hash → block, and their released prompts, oldest first."""

    __slots__ = ("index", "max_released", "num_flushes", "released")

    def __init__(self) -> None:
        self.index: dict[bytes, int] = {}
        self.released: OrderedDict[ReleasedPrompt, None] = OrderedDict()
        self.max_released = 0
        self.num_flushes = 0


class FreeQueue:
    """Blocks that nobody holds. Every operation is O(1) a block.

    Blank blocks (without a hash) are handed out first: that loses nothing. The others lie in the order of their
    release, within a prompt the last block of the chain first, and each belongs to exactly one released prompt: the
    one released last of those that share it. A prompt without blocks left is forgotten.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blank = list(range(num_blocks - 1, -1, -1))
        # OrderedDict, not dict: removal at the front must stay O(1).
        self.cached: OrderedDict[int, ReleasedPrompt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blank) + len(self.cached)

    def __contains__(self, block: int) -> bool:
        return block in self.cached or block in self._blank

    @property
    def num_cached(self) -> int:
        """Free blocks with a hash."""
        return len(self.cached)

    def pop_blank(self, n: int) -> list[int]:
        """Up to n blank blocks."""
        blocks = self._blank[-n:] if n else []
        del self._blank[len(self._blank) - len(blocks) :]
        blocks.reverse()
        return blocks

    def push_blank(self, blocks: Sequence[int]) -> None:
        """Puts blocks without a hash to the front."""
        self._blank += blocks

    def pop_cached(self) -> tuple[int, Space]:
        """The least recently released block with a hash; the caller drops the hash."""
        block, prompt = self.cached.popitem(last=False)
        self._leave(prompt, block)
        return block, prompt.space

    def remove(self, block: int) -> None:
        """Takes out a block with a hash: somebody uses it again."""
        self._leave(self.cached.pop(block), block)

    def push_prompt(self, blocks: Sequence[int], space: Space) -> None:
        """Adds a released prompt's blocks to the tail, in the order given (the last of the chain first)."""
        prompt = ReleasedPrompt(space, blocks)
        for block in blocks:
            self.cached[block] = prompt
        space.released[prompt] = None

    def retire_oldest(self, space: Space) -> list[int]:
        """Moves the blocks of the space's oldest released prompt to the front; the caller drops their hashes."""
        prompt, _ = space.released.popitem(last=False)
        blocks = list(prompt.blocks)
        for block in blocks:
            del self.cached[block]
        self._blank += reversed(blocks)
        return blocks

    @staticmethod
    def _leave(prompt: ReleasedPrompt, block: int) -> None:
        del prompt.blocks[block]
        if not prompt.blocks:
            del prompt.space.released[prompt]

    def check(self) -> None:
        """Asserts that blocks are unique and that prompts and queue agree."""
        assert len(set(self._blank)) == len(self._blank)
        assert not self.cached.keys() & set(self._blank)
        prompts = set(self.cached.values())
        assert sum(len(prompt.blocks) for prompt in prompts) == len(self.cached)
        for prompt in prompts:
            assert prompt in prompt.space.released
        for block, prompt in self.cached.items():
            assert block in prompt.blocks
