"""A replica's ledger of blocks: what its requests hold, on top of what it leases and pins at the owner."""

from collections.abc import Sequence

from serve_app.kv_cache.block_hash import BlockHasher
from serve_app.kv_cache.block_ledger import Peek
from serve_app.kv_cache.owner import CacheOwner

MAX_LEASE = 256


class BlockPool:
    """The BlockLedger with sharing and a prefix cache; see there for what the methods promise.

    The hot path is local: blocks come from a reserve leased from the owner in batches, and private blocks go back to
    it. A client holds a reserve only while it holds blocks. prefix_cache_n 0 turns the prefix cache off.
    """

    def __init__(self, owner: CacheOwner, fingerprint: bytes, block_size: int, prefix_cache_n: int) -> None:
        self._owner = owner
        self._prefix_cache_n = prefix_cache_n
        self.is_caching = prefix_cache_n > 0
        self._attach(fingerprint)
        self.block_size = block_size
        self.num_total = owner.num_total
        self.is_contiguous = False
        self.num_lookups = 0
        self.num_hits = 0
        self._batch = max(1, min(MAX_LEASE, owner.num_total // 16))
        self._reserve: list[int] = []
        self._refs = [0] * owner.num_total
        self._generation = [0] * owner.num_total
        self._is_published = bytearray(owner.num_total)
        self._num_held = 0
        self._outdated: set[int] = set()

    def _attach(self, fingerprint: bytes) -> None:
        attachment = self._owner.attach(fingerprint, self._prefix_cache_n)
        self._client = attachment.client
        self._flushes_seen = self._owner.flush_count(self._client)
        self.hasher = BlockHasher(attachment.hash_key, fingerprint)

    @property
    def num_free(self) -> int:
        return len(self._reserve) + self._owner.num_free

    @property
    def num_evictions(self) -> int:
        return self._owner.num_evictions

    def peek(self, hashes: Sequence[bytes]) -> Peek:
        if not self.is_caching:
            return Peek(0, self.num_free)
        found = self._owner.lookup(self._client, hashes)
        refs, owner = self._refs, self._owner
        leaving = sum(1 for block, _ in found if not refs[block] and owner.is_free(block))
        return Peek(len(found), self.num_free - leaving)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        if not self.is_caching or not hashes:
            return []
        self._notice_flush()
        refs, generation = self._refs, self._generation
        found = self._owner.lookup(self._client, hashes)
        fresh = [entry for entry in found if not refs[entry[0]]]
        if fresh:
            num_pinned = self._owner.pin(self._client, fresh)
            if num_pinned < len(fresh):
                found = found[: found.index(fresh[num_pinned])]
                del fresh[num_pinned:]
            for block, life in fresh:
                generation[block] = life
                self._is_published[block] = 1
            self._num_held += len(fresh)
        blocks = [block for block, _ in found]
        for block in blocks:
            refs[block] += 1
        self.num_lookups += len(hashes)
        self.num_hits += len(blocks)
        return blocks

    def allocate(self, n: int) -> list[int] | None:
        reserve = self._reserve
        missing = n - len(reserve)
        if missing > 0 and not self._lease(missing):
            return None
        refs = self._refs
        if n == 1:
            block = reserve.pop()
            refs[block] = 1
            self._num_held += 1
            return [block]
        start = len(reserve) - n
        blocks = reserve[start:]
        del reserve[start:]
        blocks.reverse()
        for block in blocks:
            refs[block] = 1
        self._num_held += n
        return blocks

    def publish(self, block_id: int, block_hash: bytes, parent_id: int) -> bool:
        if not self.is_caching:
            return False
        self._notice_flush()
        if block_id in self._outdated or parent_id in self._outdated:
            # Its K and V rest on a prefix from before the flush, and so will its successors'.
            self._outdated.add(block_id)
            return False
        if self._is_published[block_id]:
            return True
        assert self._refs[block_id] > 0, block_id
        if not self._owner.publish(self._client, block_id, self._generation[block_id], block_hash):
            return False
        self._is_published[block_id] = 1
        return True

    def fork(self, block_ids: Sequence[int], tail: tuple[int, int] | None = None) -> None:
        refs = self._refs
        for block in block_ids:
            assert refs[block] > 0, f"block {block} is shared, but nobody holds it"
            refs[block] += 1
        if tail and tail[0] in self._outdated:
            self._outdated.add(tail[1])

    def release(self, block_ids: Sequence[int]) -> None:
        refs, is_published, reserve = self._refs, self._is_published, self._reserve
        chain = []
        num_left = 0
        for block in block_ids:
            count = refs[block] - 1
            assert count >= 0, f"block {block} is released more often than it was taken"
            refs[block] = count
            if not count:
                num_left += 1
                if is_published[block]:
                    is_published[block] = 0
                    chain.append(block)
                else:
                    reserve.append(block)
        self._num_held -= num_left
        if self._outdated:
            self._outdated.difference_update([block for block in block_ids if not refs[block]])
        if chain:
            self._owner.unpin(self._client, chain)
        self._trim()

    def flush(self) -> None:
        self._owner.flush(self._client)
        self._notice_flush()

    def renew(self, fingerprint: bytes) -> None:
        assert not self._num_held, f"{self._num_held} blocks are still held"
        self.flush()
        self._owner.detach(self._client)
        self._reserve.clear()
        self._attach(fingerprint)

    def close(self) -> None:
        assert not self._num_held, f"{self._num_held} blocks are still held"
        self._owner.detach(self._client)
        self._reserve.clear()

    def _lease(self, missing: int) -> bool:
        leased = self._owner.lease(self._client, missing, max(missing, self._batch))
        generation = self._generation
        for block, life in reversed(leased):
            generation[block] = life
            self._reserve.append(block)
        return bool(leased)

    def _trim(self) -> None:
        """Keeps the reserve small, and empty where this client is idle or the owner is short of blocks."""
        keep = 0 if not self._num_held or self._owner.is_short else self._batch
        surplus = len(self._reserve) - 2 * keep
        if surplus > 0:
            surplus += keep
            self._owner.give_back(self._client, self._reserve[:surplus])
            del self._reserve[:surplus]

    def _notice_flush(self) -> None:
        """After a flush, by this client or another: nothing that is held now, nor its successors, is published."""
        num_flushes = self._owner.flush_count(self._client)
        if num_flushes != self._flushes_seen:
            self._flushes_seen = num_flushes
            self._outdated = {block for block, count in enumerate(self._refs) if count}

    def check(self) -> None:
        """Asserts that this replica's view is the owner's."""
        reserve = set(self._reserve)
        held = {block for block, count in enumerate(self._refs) if count}
        published = {block for block in range(self.num_total) if self._is_published[block]}
        assert min(self._refs) >= 0
        assert len(reserve) == len(self._reserve), "a block is in the reserve twice"
        assert not reserve & held, "a block of the reserve is held"
        assert published <= held
        assert self._outdated <= held
        assert len(held) == self._num_held
        owners = self._owner.holdings(self._client)
        assert owners.pinned == published, owners.pinned ^ published
        assert owners.leased == (held - published) | reserve, owners.leased ^ ((held - published) | reserve)
        assert held or not reserve, "an idle client holds a lease"
