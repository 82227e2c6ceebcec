"""The ledger without paging: one range of blocks for each request, nothing shared, nothing cached."""

import secrets
from collections.abc import Sequence

from serve_app.kv_cache.block_hash import BlockHasher
from serve_app.kv_cache.block_ledger import PLAIN, Peek


class ContiguousPool:
    """The BlockLedger behind --no-paged-attn: allocate() returns consecutive block ids, best fit; neighbours coalesce.

    There are never more free ranges than requests plus one, so they are searched one by one.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0, num_blocks
        self.num_total = num_blocks
        self.num_free = num_blocks
        self.block_size = block_size
        self.is_contiguous = True
        self.is_caching = False
        self.hasher = BlockHasher(secrets.token_bytes(32), b"")
        self.num_lookups = self.num_hits = self.num_evictions = 0
        self._free_lengths = {0: num_blocks}
        self._free_ends = {num_blocks: 0}
        self._taken: dict[int, int] = {}

    def peek_tables(self, hashes: Sequence[bytes], lookbacks: Sequence[int] = PLAIN) -> Peek:
        return Peek(0, self.num_free)

    def match_tables(self, hashes: Sequence[bytes], lookbacks: Sequence[int] = PLAIN) -> list[list[int]]:
        return [[] for _ in lookbacks]

    def allocate(self, n: int) -> list[int] | None:
        if n == 0:
            return []
        fitting = [(length, start) for start, length in self._free_lengths.items() if length >= n]
        if not fitting:
            return None
        length, start = min(fitting)
        self._take_free(start)
        if length > n:
            self._add_free(start + n, length - n)
        self._taken[start] = n
        self.num_free -= n
        return list(range(start, start + n))

    def publish(self, block_id: int, block_hash: bytes, parent_id: int) -> bool:
        return False

    def fork(self, block_ids: Sequence[int], tail: tuple[int, int] | None = None) -> None:
        raise AssertionError("a contiguous range is one request's alone; further choices compute the prompt themselves")

    def give_up(self, block_ids: Sequence[int], heir: int, prompt: int) -> None:
        raise AssertionError("a contiguous range is given back as a whole")

    def release(self, block_ids: Sequence[int], prompt: int = 0) -> None:
        if not block_ids:
            return
        start, length = block_ids[0], len(block_ids)
        assert self._taken.get(start) == length, f"blocks {start}..{start + length - 1} are not one request's range"
        del self._taken[start]
        self.num_free += length
        after = self._free_lengths.get(start + length)
        if after is not None:
            self._take_free(start + length)
            length += after
        before = self._free_ends.get(start)
        if before is not None:
            length += self._take_free(before)
            start = before
        self._add_free(start, length)

    def flush(self) -> None:
        """Nothing is ever found again, so there is nothing to forget."""

    def renew(self, fingerprint: bytes) -> None:
        assert not self._taken, f"{len(self._taken)} ranges are still held"

    def close(self) -> None:
        assert not self._taken, f"{len(self._taken)} ranges are still held"

    def _add_free(self, start: int, length: int) -> None:
        self._free_lengths[start] = length
        self._free_ends[start + length] = start

    def _take_free(self, start: int) -> int:
        length = self._free_lengths.pop(start)
        del self._free_ends[start + length]
        return length

    def check(self) -> None:
        """Asserts that free and taken ranges tile the pool, and that free neighbours are joined."""
        position, was_free = 0, False
        while position < self.num_total:
            is_free = position in self._free_lengths
            assert is_free != (position in self._taken), f"block {position} is free and taken, or neither"
            assert not (was_free and is_free), f"free ranges meet at {position}"
            position += self._free_lengths[position] if is_free else self._taken[position]
            was_free = is_free
        assert position == self.num_total
        assert sum(self._free_lengths.values()) == self.num_free
        assert {start + length: start for start, length in self._free_lengths.items()} == self._free_ends
