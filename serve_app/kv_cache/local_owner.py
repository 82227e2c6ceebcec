"""The owner of the blocks inside the engine's own process."""

import secrets
from collections.abc import Sequence

from serve_app.kv_cache.free_queue import FreeQueue, Space
from serve_app.kv_cache.owner import Attachment, Holdings, OwnerStats

NO_CLIENT = 0


class _Client:
    """column[b] is 1 where the client pins block b."""

    __slots__ = ("column", "space")

    def __init__(self, space: Space, num_blocks: int) -> None:
        self.space = space
        self.column = bytearray(num_blocks)


class LocalOwner:
    """A CacheOwner for clients of one process that all run on one thread (a target's engine and its local draft)."""

    def __init__(self, num_blocks: int, hash_key: bytes | None = None) -> None:
        assert num_blocks > 0, num_blocks
        self.num_total = num_blocks
        self.is_short = False
        self._hash_key = hash_key or secrets.token_bytes(32)
        self._queue = FreeQueue(num_blocks)
        self._generation = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._pins = [0] * num_blocks
        self._lessee = [NO_CLIENT] * num_blocks
        self._spaces: dict[bytes, Space] = {}
        self._clients: dict[int, _Client] = {}
        self._last_client = NO_CLIENT
        self.num_evictions = 0
        self._num_retired = 0

    @property
    def num_free(self) -> int:
        return len(self._queue)

    def attach(self, fingerprint: bytes, max_released_prompts: int) -> Attachment:
        space = self._spaces.setdefault(fingerprint, Space())
        space.max_released = max(space.max_released, max_released_prompts)
        self._last_client += 1
        self._clients[self._last_client] = _Client(space, self.num_total)
        return Attachment(self._last_client, self._hash_key)

    def detach(self, client: int) -> None:
        column = self._clients[client].column
        self.unpin(client, [block for block in range(self.num_total) if column[block]])
        self.give_back(client, [block for block, lessee in enumerate(self._lessee) if lessee == client])
        del self._clients[client]

    def lease(self, client: int, need: int, want: int) -> list[tuple[int, int]]:
        queue, generation, lessee = self._queue, self._generation, self._lessee
        if need > len(queue):
            self.is_short = True
            return []
        self.is_short = False
        leased = queue.pop_blank(want)
        for _ in range(need - len(leased)):
            block, space = queue.pop_cached()
            self._drop_hash(block, space)
            self.num_evictions += 1
            leased.append(block)
        for block in leased:
            generation[block] += 1
            lessee[block] = client
        return [(block, generation[block]) for block in leased]

    def give_back(self, client: int, blocks: Sequence[int]) -> None:
        lessee = self._lessee
        for block in blocks:
            assert lessee[block] == client, (block, lessee[block], client)
            lessee[block] = NO_CLIENT
        self._queue.push_blank(blocks)

    def lookup(self, client: int, hashes: Sequence[bytes]) -> list[tuple[int, int]]:
        index, generation = self._clients[client].space.index, self._generation
        found = []
        for block_hash in hashes:
            block = index.get(block_hash)
            if block is None:
                break
            found.append((block, generation[block]))
        return found

    def lookup_tail(self, client: int, hashes: Sequence[bytes], length: int) -> tuple[int, list[tuple[int, int]]]:
        index, generation = self._clients[client].space.index, self._generation
        end = run = 0
        for i in range(len(hashes) - 1, -1, -1):
            if hashes[i] not in index:
                run = 0
                continue
            run += 1
            end = end if run > 1 else i + 1
            if run == length:
                break
        blocks = [index[block_hash] for block_hash in hashes[end - run : end]] if run else []
        return (end if run else 0), [(block, generation[block]) for block in blocks]

    def pin(self, client: int, found: Sequence[tuple[int, int]]) -> int:
        column, pins, queue = self._clients[client].column, self._pins, self._queue
        for count, (block, generation) in enumerate(found):
            if self._generation[block] != generation or self._hash[block] is None:
                return count
            if not column[block]:
                column[block] = 1
                if not pins[block]:
                    queue.remove(block)
                pins[block] += 1
        return len(found)

    def unpin(self, client: int, chain: Sequence[int], prompt: int = 0) -> None:
        me, pins = self._clients[client], self._pins
        cached: list[int] = []
        blank: list[int] = []
        for block in reversed(chain):
            assert me.column[block], (block, client)
            me.column[block] = 0
            pins[block] -= 1
            if not pins[block]:
                (blank if self._hash[block] is None else cached).append(block)
        self._queue.push_blank(blank)
        if cached:
            self._queue.push_prompt(cached, me.space, (client, prompt) if prompt else None)
            self._retire(me.space)

    def publish(self, client: int, block: int, generation: int, block_hash: bytes) -> bool:
        me = self._clients[client]
        if self._lessee[block] != client or self._generation[block] != generation or block_hash in me.space.index:
            return False
        me.space.index[block_hash] = block
        self._hash[block] = block_hash
        self._lessee[block] = NO_CLIENT
        self._pins[block] = me.column[block] = 1
        return True

    def is_free(self, block: int) -> bool:
        return not self._pins[block] and self._lessee[block] == NO_CLIENT

    def flush(self, client: int) -> None:
        space = self._clients[client].space
        space.num_flushes += 1
        while space.released:
            self._retire_oldest(space)
        for block in list(space.index.values()):
            self._drop_hash(block, space)

    def flush_count(self, client: int) -> int:
        return self._clients[client].space.num_flushes

    def holdings(self, client: int) -> Holdings:
        column = self._clients[client].column
        return Holdings(
            leased=frozenset(block for block, lessee in enumerate(self._lessee) if lessee == client),
            pinned=frozenset(block for block in range(self.num_total) if column[block]),
        )

    def stats(self) -> OwnerStats:
        return OwnerStats(
            num_total=self.num_total,
            num_free=len(self._queue),
            num_cached=self._queue.num_cached,
            num_clients=len(self._clients),
            num_released_prompts=sum(len(space.released) for space in self._spaces.values()),
            num_evictions=self.num_evictions,
            num_retired_prompts=self._num_retired,
        )

    def _drop_hash(self, block: int, space: Space) -> None:
        block_hash = self._hash[block]
        assert block_hash is not None, block
        del space.index[block_hash]
        self._hash[block] = None
        self._generation[block] += 1

    def _retire(self, space: Space) -> None:
        while len(space.released) > space.max_released:
            self._retire_oldest(space)
            self._num_retired += 1

    def _retire_oldest(self, space: Space) -> None:
        for block in self._queue.retire_oldest(space):
            self._drop_hash(block, space)

    def check(self) -> None:
        """Asserts the invariants of the whole ledger."""
        self._queue.check()
        for block in range(self.num_total):
            pins = sum(client.column[block] for client in self._clients.values())
            assert pins == self._pins[block], (block, pins, self._pins[block])
            assert not (pins and self._lessee[block]), f"block {block} is leased and pinned"
            assert self.is_free(block) == (block in self._queue), f"block {block} is in the queue iff nobody holds it"
            assert (block in self._queue.cached) == (self.is_free(block) and self._hash[block] is not None), block
            assert self._lessee[block] == NO_CLIENT or self._hash[block] is None, f"leased block {block} has a hash"
            assert self._lessee[block] == NO_CLIENT or self._lessee[block] in self._clients, block
        hashed = {block for block, block_hash in enumerate(self._hash) if block_hash is not None}
        indexed: list[int] = []
        for space in self._spaces.values():
            indexed += space.index.values()
            assert all(self._hash[block] == block_hash for block_hash, block in space.index.items())
            assert len(space.released) <= space.max_released
            assert all(prompt.blocks for prompt in space.released), "a released prompt without blocks counts"
        assert len(indexed) == len(hashed), "a hash points to exactly one block"
        assert set(indexed) == hashed
        held = sum(1 for block in range(self.num_total) if not self.is_free(block))
        assert held + len(self._queue) == self.num_total
