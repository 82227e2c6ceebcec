"""The blocks that requests hold: taken at admission, grown, published, shared, given up behind windows, released."""

from collections.abc import Sequence
from itertools import chain, count

from serve_app.engine.request import Request
from serve_app.kv_cache.block_ledger import NO_BLOCK, BlockLedger, group_hash
from serve_app.kv_cache.layer_groups import KvWindow


class BlockTables:
    """Keeps Request.tables: for each group of layers a list of blocks in the order of the tokens.

    A group without a window has blocks for all known tokens from admission on. One with a window has them from the
    first that some token still to be computed sees, up to the end of the next chunk: as a request moves on, blocks
    behind the window are given up (NO_BLOCK stands in their place) and others taken in front, so that it never holds
    more than KvWindow.most_blocks. Blocks that were taken for drafts stay for the tokens that come there later.
    """

    def __init__(self, pool: BlockLedger, windows: Sequence[KvWindow]) -> None:
        """windows: by group; has_windows: of any."""
        self.pool = pool
        self.num_groups = len(windows)
        self.prefix_lookups = 0
        self.prefix_hits = 0
        self._windows = windows
        self._lookbacks = tuple(window.num_lookback for window in windows)
        self.has_windows = any(self._lookbacks)
        self._block_size = pool.block_size
        self._prompt_numbers = count(1)

    def admit(self, request: Request, reserve: int) -> bool:
        """Takes what a request needs to begin with: what the prefix cache has, then new blocks; all or none.

        reserve: blocks that have to stay free besides.
        """
        if self.pool.is_contiguous:
            blocks = self.pool.allocate(-(-request.max_total_tokens // self._block_size))
            if blocks is not None:
                request.tables, request.num_given_up = [blocks], [0]
            return blocks is not None
        hashes = self._prompt_hashes(request)
        peek = self.pool.peek_tables(hashes, self._lookbacks)
        if sum(self._num_fresh(request, peek.num_matched)) + reserve > peek.num_free_after:
            return False
        tables = self.pool.match_tables(hashes, self._lookbacks)
        num_matched = len(tables[0])
        num_fresh = self._num_fresh(request, num_matched)
        fresh = self.pool.allocate(sum(num_fresh))
        if fresh is None:
            self.pool.release(_held(tables))
            return False
        request.num_given_up = [table.count(NO_BLOCK) for table in tables]
        request.tables = tables
        _hand_out(fresh, tables, num_fresh)
        request.num_computed = num_matched * self._block_size
        request.num_published = num_matched
        if hashes:
            self.prefix_lookups += 1
            self.prefix_hits += num_matched > 0
        return True

    def _num_fresh(self, request: Request, num_matched: int) -> list[int]:
        """By group, the blocks to take beyond those of a prefix."""
        num_all, start = -(-request.num_tokens // self._block_size), num_matched * self._block_size
        return [
            min(num_all, window.first_block(start) + window.most_blocks(request.num_tokens)) - num_matched
            for window in self._windows
        ]

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Sees to it that the next num_tokens have blocks; False, and nothing changed, where too few are free."""
        end = -(-(request.num_computed + num_tokens) // self._block_size)
        missing = [max(0, end - len(table)) for table in request.tables]
        blocks = self.pool.allocate(sum(missing))
        if blocks is None:
            return False
        _hand_out(blocks, request.tables, missing)
        return True

    def advance(self, request: Request) -> None:
        """After a step took on more of a request: publishes blocks that are full, gives up those behind a window."""
        self.publish(request)
        if self.has_windows:
            self._slide(request)

    def publish(self, request: Request) -> None:
        """Lets others find the blocks that are full of known tokens."""
        num_full = min(request.num_computed, request.num_known) // self._block_size
        if num_full > request.num_published and self.pool.is_caching:
            self._extend_hashes(request, num_full)
            for group, table in enumerate(request.tables):
                for i in range(request.num_published, num_full):
                    key = group_hash(request.block_hashes[i], group, self.num_groups)
                    self.pool.publish(table[i], key, table[i - 1] if i else NO_BLOCK)
            request.num_published = num_full

    def _slide(self, request: Request) -> None:
        # Siblings compute the last prompt token once more.
        position = request.num_computed - bool(request.siblings)
        for group, window in enumerate(self._windows):
            table, given_up = request.tables[group], request.num_given_up[group]
            # Never all: the next block has to know its parent.
            first = min(window.first_block(position), len(table) - 1)
            if self.pool.is_caching:
                first = min(first, request.num_published)
            if first <= given_up:
                continue
            if not request.prompt_number:
                request.prompt_number = next(self._prompt_numbers)
            self.pool.give_up(table[given_up:first], table[first], request.prompt_number)
            table[given_up:first] = [NO_BLOCK] * (first - given_up)
            request.num_given_up[group] = first
            # At once, before somebody else takes them: a prompt that began shall not wait in its middle.
            num_all = -(-request.num_tokens // self._block_size)
            end = min(num_all, first + window.most_blocks(request.num_tokens))
            if len(table) < end:
                table += self.pool.allocate(min(end - len(table), first - given_up)) or []

    def fork(self, leader: Request, sibling: Request) -> list[tuple[int, int]] | None:
        """Gives a further choice the prompt's blocks of the first one, but the last of them, as (source, copy), for its
        own; None, and nothing changed, where there is no room."""
        own = None if self.pool.is_contiguous else self.pool.allocate(self.num_groups)
        if own is None:
            return None
        # The last prompt token is computed once more by each choice: its logits are what they differ from.
        num_full, num_tail = divmod(leader.num_prompt - 1, self._block_size)
        copies = []
        for table, given_up, block in zip(leader.tables, leader.num_given_up, own, strict=True):
            tail = (table[num_full], block) if num_tail else None
            self.pool.fork(table[given_up:num_full], tail)
            sibling.tables.append([*table[:num_full], block])
            copies += [tail] if tail else []
        sibling.num_given_up = list(leader.num_given_up)
        sibling.num_computed = leader.num_prompt - 1
        sibling.num_published = min(leader.num_published, num_full)
        sibling.block_hashes = leader.block_hashes[: sibling.num_published]
        return copies

    def release(self, request: Request) -> None:
        """Gives up all that a request holds; nothing of it is computed any more."""
        self.pool.release(_held(request.tables), request.prompt_number)
        request.tables, request.num_given_up = [], []

    def _prompt_hashes(self, request: Request) -> list[bytes]:
        """What to look up at admission. The last token is always computed anew, so that there are logits."""
        if not self.pool.is_caching or request.prompt_logprobs is not None:
            return []
        num_full = (request.num_tokens - 1) // self._block_size
        self._extend_hashes(request, num_full)
        return request.block_hashes[:num_full]

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        hashes, size, hasher = request.block_hashes, self._block_size, self.pool.hasher
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else hasher.root(request.cache_salt, request.angles.key)
            hashes.append(hasher.next(parent, request.token_ids[start : start + size]))


def _hand_out(blocks: Sequence[int], tables: Sequence[list[int]], counts: Sequence[int]) -> None:
    start = 0
    for table, number in zip(tables, counts, strict=True):
        table += blocks[start : start + number]
        start += number


def _held(tables: Sequence[Sequence[int]]) -> list[int]:
    """The blocks of tables in the order of the tokens, so that what lies deep in a prompt is forgotten first."""
    if len(tables) == 1 and NO_BLOCK not in tables[0][:1]:
        return list(tables[0])
    longest = max((len(table) for table in tables), default=0)
    padded = [[*table, *[NO_BLOCK] * (longest - len(table))] for table in tables]
    return [block for block in chain.from_iterable(zip(*padded, strict=True)) if block != NO_BLOCK]
