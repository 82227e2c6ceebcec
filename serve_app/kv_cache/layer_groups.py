"""Which layers share a block table, and what of a request's tokens their blocks must hold."""

from collections.abc import Sequence
from dataclasses import dataclass

_PADDING_WEIGHT = 20
"""Groups that a share of padded memory is worth: a twentieth is worth one table less."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose K and V of the same tokens lie in the same blocks.

    window: keys that a query sees in these layers, itself included; 0: all. Blocks before it are given up.
    """

    window: int
    layers: tuple[int, ...]


def group_layers(windows: Sequence[int], max_tokens: int) -> tuple[LayerGroup, ...]:
    """Groups for a model whose layers have these windows (0: none); max_tokens: the longest request.

    A block holds as many layers as the largest group has, whichever group it serves: all groups draw on one pool, so
    nothing has to be decided about how memory is split between them. Layers of one kind may thus need several groups,
    and a group that is smaller than the largest wastes the rest of its blocks; the size is chosen to keep both few.
    """
    kinds: dict[int, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window if window < max_tokens else 0, []).append(layer)
    size = _group_size([len(layers) for layers in kinds.values()])
    return tuple(
        LayerGroup(window, tuple(layers[first : first + size]))
        for window, layers in sorted(kinds.items())
        for first in range(0, len(layers), size)
    )


def _group_size(counts: Sequence[int]) -> int:
    def cost(size: int) -> float:
        groups = [-(-count // size) for count in counts]
        waste = max((n * size - count) / count for n, count in zip(groups, counts, strict=True))
        return sum(groups) + _PADDING_WEIGHT * waste

    return min(range(max(counts), 0, -1), key=cost)


@dataclass(frozen=True, slots=True)
class KvWindow:
    """What one group's table of a request must cover.

    tokens: keys that a query sees, itself included; 0: all. chunk_tokens: those that a step computes at most.
    """

    tokens: int
    block_size: int
    chunk_tokens: int

    @property
    def num_lookback(self) -> int:
        """Full blocks that must be known before a token at a block's beginning can be computed; 0: all of them."""
        return max(1, -(-(self.tokens - 1) // self.block_size)) if self.tokens else 0

    def first_block(self, position: int) -> int:
        """The first block of a table that a query at this position reads, or its successors do."""
        return max(0, position - self.tokens + 1) // self.block_size if self.tokens else 0

    def most_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of so many tokens holds at the most."""
        blocks = -(-num_tokens // self.block_size)
        if not self.tokens:
            return blocks
        # So many neighbouring tokens, wherever they begin in a block: what a chunk sees, and one token before it, since
        # further choices compute the last prompt token again.
        return min(blocks, (self.tokens + self.chunk_tokens + self.block_size - 2) // self.block_size + 1)


def longest_request(windows: Sequence[KvWindow], num_blocks: int, max_tokens: int) -> int:
    """Tokens of the longest request that a pool of num_blocks can hold at all, in whole blocks; no more than what
    max_tokens need. windows: of each group."""
    block_size = windows[0].block_size
    least, most = 0, -(-max_tokens // block_size)
    while least < most:
        middle = (least + most + 1) // 2
        if sum(window.most_blocks(middle * block_size) for window in windows) <= num_blocks:
            least = middle
        else:
            most = middle - 1
    return least * block_size


def fit_windows(
    groups: Sequence[LayerGroup], block_size: int, chunk_tokens: int, num_blocks: int, max_tokens: int
) -> tuple[KvWindow, ...]:
    """What each group's tables must cover over a pool of num_blocks.

    Where the pool would hold no request of max_tokens because a chunk takes too much of it, chunks are made shorter.
    """
    fitting: tuple[KvWindow, ...] = ()
    longest = -1
    while longest < max_tokens:
        windows = tuple(KvWindow(group.window, block_size, chunk_tokens) for group in groups)
        if longest_request(windows, num_blocks, max_tokens) > longest:
            fitting, longest = windows, longest_request(windows, num_blocks, max_tokens)
        if chunk_tokens <= block_size or not any(group.window for group in groups):
            break
        chunk_tokens = max(block_size, chunk_tokens // 2)
    return fitting
