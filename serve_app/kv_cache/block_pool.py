"""A replica's ledger of blocks: what its requests hold, on top of what it leases and pins at the owner."""

from collections.abc import Sequence

from serve_app.kv_cache.block_hash import BlockHasher
from serve_app.kv_cache.block_ledger import NO_BLOCK, PLAIN, Peek, group_hash
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
        """peek_tables() of a single table that needs all of a prefix."""
        return self.peek_tables(hashes)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """match_tables() of a single table that needs all of a prefix."""
        return self.match_tables(hashes)[0]

    def peek_tables(self, hashes: Sequence[bytes], lookbacks: Sequence[int] = PLAIN) -> Peek:
        if not self.is_caching:
            return Peek(0, self.num_free)
        length, tables = self._look_up(hashes, lookbacks)
        refs, owner = self._refs, self._owner
        leaving = sum(1 for found in tables for block, _ in found if not refs[block] and owner.is_free(block))
        return Peek(length, self.num_free - leaving)

    def match_tables(self, hashes: Sequence[bytes], lookbacks: Sequence[int] = PLAIN) -> list[list[int]]:
        if not self.is_caching or not hashes:
            return [[] for _ in lookbacks]
        self._notice_flush()
        length, tables = self._look_up(hashes, lookbacks)
        while not self._pin([entry for found in tables for entry in found]):
            # Some went to others meanwhile: those before them may still do.
            length, tables = self._look_up(hashes[: length - 1], lookbacks)
        refs = self._refs
        matched = []
        for found in tables:
            blocks = [block for block, _ in found]
            for block in blocks:
                refs[block] += 1
            matched.append([NO_BLOCK] * (length - len(blocks)) + blocks)
            self.num_lookups += len(hashes)
            self.num_hits += len(blocks)
        return matched

    def _look_up(self, hashes: Sequence[bytes], lookbacks: Sequence[int]) -> tuple[int, list[list[tuple[int, int]]]]:
        """The longest prefix that all groups can use, and each group's blocks of it with their generations."""
        owner, client, num_groups = self._owner, self._client, len(lookbacks)
        length, agreeing, group = len(hashes), 0, 0
        tables: list[list[tuple[int, int]]] = [[] for _ in lookbacks]
        while agreeing < num_groups:
            keys: Sequence[bytes] = hashes[:length]
            if num_groups > 1:
                keys = [group_hash(block_hash, group, num_groups) for block_hash in keys]
            if lookbacks[group]:
                found_length, tables[group] = owner.lookup_tail(client, keys, lookbacks[group])
            else:
                tables[group] = owner.lookup(client, keys)
                found_length = len(tables[group])
            # A shorter prefix has to suit those asked before, too.
            agreeing = agreeing + 1 if found_length == length else 1
            length, group = found_length, (group + 1) % num_groups
        return length, tables

    def _pin(self, found: Sequence[tuple[int, int]]) -> bool:
        """Pins what this client does not hold yet; False, and nothing is pinned, where one of them is gone."""
        fresh = [entry for entry in found if not self._refs[entry[0]]]
        num_pinned = self._owner.pin(self._client, fresh)
        if num_pinned < len(fresh):
            self._owner.unpin(self._client, [block for block, _ in fresh[:num_pinned]])
            return False
        for block, life in fresh:
            self._generation[block] = life
            self._is_published[block] = 1
        self._num_held += len(fresh)
        return True

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

    def give_up(self, block_ids: Sequence[int], heir: int, prompt: int) -> None:
        if any(block in self._outdated for block in block_ids):
            # publish() knows by its parent that a block must stay private: that parent is about to go.
            self._outdated.add(heir)
        self.release(block_ids, prompt)

    def release(self, block_ids: Sequence[int], prompt: int = 0) -> None:
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
            self._owner.unpin(self._client, chain, prompt)
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
