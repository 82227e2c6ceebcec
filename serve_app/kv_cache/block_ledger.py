"""What the scheduler knows of a block pool: one face for the paged and the contiguous ledger."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from serve_app.kv_cache.block_hash import BlockHasher

NO_BLOCK = -1
"""The parent of a request's first block; in a block table: a block that was given up."""

PLAIN = (0,)
"""The lookbacks of a model without windows: one table, which needs all of a prefix."""


class Peek(NamedTuple):
    """What match_tables() would find: the blocks of the prefix, and what num_free would be afterwards."""

    num_matched: int
    num_free_after: int


class BlockLedger(Protocol):
    """Hands out the blocks of a KV pool and takes them back; all calls on one thread, the engine's.

    A block table is a list of block ids in chain order. Every id that a call returned is given back by release()
    exactly once for each time that it was returned.
    """

    @property
    def num_total(self) -> int:
        """Blocks in the pool."""

    @property
    def num_free(self) -> int:
        """Blocks that allocate() could return now; those that only the prefix cache keeps count as free."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""

    @property
    def is_contiguous(self) -> bool:
        """True: a request's blocks are one range. It allocates all it can ever need at admission and never grows."""

    @property
    def is_caching(self) -> bool:
        """False: nothing is ever found again, so hashing is for nothing."""

    @property
    def hasher(self) -> BlockHasher:
        """Makes the hashes for match() and publish(), with the key that all who share the blocks use."""

    @property
    def num_lookups(self) -> int:
        """Blocks asked for by match(), since the start."""

    @property
    def num_hits(self) -> int:
        """Blocks found by match(), since the start."""

    @property
    def num_evictions(self) -> int:
        """Blocks with a hash that were taken for something else, since the start, by all who share them."""

    def peek_tables(self, hashes: Sequence[bytes], lookbacks: Sequence[int] = PLAIN) -> Peek:
        """What match_tables() would do, without doing it."""

    def match_tables(self, hashes: Sequence[bytes], lookbacks: Sequence[int] = PLAIN) -> list[list[int]]:
        """The beginning of a table for each group of layers, over the longest prefix of hashes that can be used.

        lookbacks: by group, how many blocks before the next token must be cached; 0: all. The tables are equally long;
        what lies before a lookback is NO_BLOCK. The other blocks are then held as allocated ones are, but must not be
        written. A block of one of several groups is found under group_hash().
        """

    def allocate(self, n: int) -> list[int] | None:
        """n blocks, or None (and nothing changed) when fewer are free."""

    def publish(self, block_id: int, block_hash: bytes, parent_id: int) -> bool:
        """Lets others find a block whose tokens are all computed and accepted; it must not be written any more.

        Call it in chain order; parent_id is the block before it in the request's table, NO_BLOCK for the first one.
        False where the block stays private: its hash is published by another block, the prefix cache is off, or its
        K and V stem from before a flush.
        """

    def fork(self, block_ids: Sequence[int], tail: tuple[int, int] | None = None) -> None:
        """Counts another holder of blocks that are held already: a further choice shares the prompt's full blocks.

        Shared blocks must be full: nobody writes them any more. The partial last block is not shared: the new choice
        allocates its own and KvPool.copy_block fills it. tail names this (source, copy), so that a copy of content
        from before a flush counts as such.
        """

    def release(self, block_ids: Sequence[int], prompt: int = 0) -> None:
        """Gives up what a request holds, in chain order: it finished, was aborted or preempted. Its published
        blocks stay findable as one released prompt until they are needed or too many prompts were released since.

        prompt: a number of the request's own with which it gave up blocks before: they count as the same prompt.
        """

    def give_up(self, block_ids: Sequence[int], heir: int, prompt: int) -> None:
        """Releases the first blocks of a table that goes on with heir: no query reads them any more."""

    def flush(self) -> None:
        """Forgets every hash: K and V of the same tokens have changed. Only between two steps. Running requests keep
        their blocks, and what they compute on top of them is never published."""

    def renew(self, fingerprint: bytes) -> None:
        """Forgets every hash and goes on for another model, of which fingerprint tells; no block may be held. Hashes
        that were made by the hasher so far are worthless then."""

    def check(self) -> None:
        """Asserts the ledger's invariants; slow, for tests."""

    def close(self) -> None:
        """Gives everything back to the owner; no block may be held."""


def group_hash(block_hash: bytes, group: int, num_groups: int) -> bytes:
    """What a block of a group of layers is published under; block_hash stands for the tokens."""
    return block_hash if num_groups == 1 else block_hash + bytes((group,))
