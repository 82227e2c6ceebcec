"""The free queue: blank blocks in front, then released prompts' blocks, least recently released first."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

PromptKey: TypeAlias = tuple[int, int]
"""A client, and its number for a request."""


class ReleasedPrompt:
    """The free blocks that one released request left in the prefix cache. key: by which more of them come later."""

    __slots__ = ("blocks", "key", "space")

    def __init__(self, space: "Space", blocks: Iterable[int], key: PromptKey | None) -> None:
        self.space = space
        self.key = key
        self.blocks = dict.fromkeys(blocks)


class Space:
    """What clients of one fingerprint share: hash → block, and their released prompts, oldest first.

    growing: of the prompts, those to which blocks may still come.
    """

    __slots__ = ("growing", "index", "max_released", "num_flushes", "released")

    def __init__(self) -> None:
        self.index: dict[bytes, int] = {}
        self.released: OrderedDict[ReleasedPrompt, None] = OrderedDict()
        self.growing: dict[PromptKey, ReleasedPrompt] = {}
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

    def push_prompt(self, blocks: Sequence[int], space: Space, key: PromptKey | None = None) -> None:
        """Adds a released prompt's blocks to the tail, in the order given (the last of the chain first).

        key: a prompt that is still there under it gets the blocks, and counts as released now.
        """
        prompt = space.growing.get(key) if key else None
        if prompt is None:
            prompt = ReleasedPrompt(space, blocks, key)
            if key:
                space.growing[key] = prompt
        else:
            prompt.blocks.update(dict.fromkeys(blocks))
        for block in blocks:
            self.cached[block] = prompt
        space.released[prompt] = None
        space.released.move_to_end(prompt)

    def retire_oldest(self, space: Space) -> list[int]:
        """Moves the blocks of the space's oldest released prompt to the front; the caller drops their hashes."""
        prompt = next(iter(space.released))
        blocks = list(prompt.blocks)
        self._forget(prompt)
        for block in blocks:
            del self.cached[block]
        self._blank += reversed(blocks)
        return blocks

    @staticmethod
    def _leave(prompt: ReleasedPrompt, block: int) -> None:
        del prompt.blocks[block]
        if not prompt.blocks:
            FreeQueue._forget(prompt)

    @staticmethod
    def _forget(prompt: ReleasedPrompt) -> None:
        del prompt.space.released[prompt]
        if prompt.key:
            del prompt.space.growing[prompt.key]

    def check(self) -> None:
        """Asserts that blocks are unique and that prompts and queue agree."""
        assert len(set(self._blank)) == len(self._blank)
        assert not self.cached.keys() & set(self._blank)
        prompts = set(self.cached.values())
        assert sum(len(prompt.blocks) for prompt in prompts) == len(self.cached)
        for prompt in prompts:
            assert prompt in prompt.space.released
            assert not prompt.key or prompt.space.growing[prompt.key] is prompt
            assert len(prompt.space.growing) <= len(prompt.space.released)
        for block, prompt in self.cached.items():
            assert block in prompt.blocks
