"""Random operations of several replicas on one owner keep the invariants of the ledger.

A model of the K/V contents runs beside the ledger: a block's content is the tokens that it and all blocks before it
were computed from, with fingerprint, salt and flush epoch. So a cache hit on a wrong, stale or overwritten block, and
a write to a block that somebody else reads, are both seen.
"""

import dataclasses
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from serve_app.kv_cache.block_ledger import NO_BLOCK
from serve_app.kv_cache.block_pool import BlockPool
from serve_app.kv_cache.local_owner import LocalOwner

BLOCK = 4
FINGERPRINTS = (b"target", b"target", b"draft")
SALTS = (b"", b"", b"tenant")
# Prompts out of few pieces, so that prefixes are often shared.
HEADS = st.sampled_from([(1, 1, 1, 1), (1, 1, 1, 1, 2, 2, 2, 2), (2, 2, 2, 2)])
TAILS = st.lists(st.sampled_from([(1, 1, 1, 1), (2, 2, 2, 2), (3,), (1, 2)]), min_size=1, max_size=4)
PROMPTS = st.tuples(HEADS, TAILS).map(lambda parts: [*parts[0], *(token for part in parts[1] for token in part)])


@dataclasses.dataclass
class Running:
    """A request as the model sees it. epoch: its fingerprint's flushes when the oldest of its K/V was computed."""

    client: int
    salt: bytes
    tokens: list[int]
    blocks: list[int]
    num_computed: int
    num_published: int
    epoch: int

    def content(self, end: int) -> tuple[object, ...]:
        return (FINGERPRINTS[self.client], self.salt, self.epoch, tuple(self.tokens[:end]))


class LedgerMachine(RuleBasedStateMachine):
    """Three replicas: two of the target, one of the draft."""

    num_steps: ClassVar[int] = 0
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(
        num_blocks=st.integers(6, 40),
        limits=st.tuples(*[st.sampled_from((3, 1, 2, 8, 0))] * 3),
        lease=st.integers(1, 6),
    )
    def start(self, num_blocks: int, limits: tuple[int, ...], lease: int) -> None:
        self.owner = LocalOwner(num_blocks, hash_key=bytes(32))
        self.limits, self.lease = limits, lease
        self.pools = [self.attach(client) for client in range(3)]
        self.contents: dict[int, tuple[object, ...]] = {}
        self.epochs = dict.fromkeys(FINGERPRINTS, 0)
        self.running: list[Running] = []
        self.waiting: list[tuple[int, bytes, list[int]]] = []
        self.probe = self.owner.attach(b"target", 0).client
        self.looked_up: list[tuple[tuple[int, int], tuple[object, ...]]] = []

    def attach(self, client: int) -> BlockPool:
        pool = BlockPool(self.owner, FINGERPRINTS[client], BLOCK, self.limits[client])
        pool._batch = self.lease
        return pool

    def count(self, event: str) -> None:
        LedgerMachine.seen[event] += 1

    def pick(self, number: int) -> Running:
        return self.running[number % len(self.running)]

    def finish(self, request: Running) -> None:
        self.running.remove(request)
        self.pools[request.client].release(request.blocks)

    @rule(client=st.integers(0, 2), salt=st.sampled_from(SALTS), tokens=PROMPTS)
    def add(self, client: int, salt: bytes, tokens: list[int]) -> None:
        self.admit(client, salt, tokens)

    @rule(client=st.integers(0, 2), salt=st.sampled_from(SALTS), tokens=PROMPTS, num_tokens=st.integers(0, 6))
    def serve(self, client: int, salt: bytes, tokens: list[int], num_tokens: int) -> None:
        """A whole request at once, with its decode."""
        if self.admit(client, salt, tokens):
            request = self.running[-1]
            self.advance(request, len(tokens))
            self.advance(request, num_tokens)
            if request in self.running:
                self.finish(request)

    @precondition(lambda self: self.waiting)
    @rule()
    def readmit(self) -> None:
        self.admit(*self.waiting.pop(0))

    def admit(self, client: int, salt: bytes, tokens: list[int]) -> bool:
        pool = self.pools[client]
        hashes = pool.hasher.chain(salt, tokens[:-1], BLOCK)
        peek = pool.peek(hashes)
        matched = pool.match(hashes)
        assert peek == (len(matched), pool.num_free)
        request = Running(client, salt, tokens, matched, 0, len(matched), self.epochs[FINGERPRINTS[client]])
        for i, block in enumerate(matched):
            assert self.contents[block] == request.content((i + 1) * BLOCK), "a cache hit on the wrong content"
        request.num_computed = len(matched) * BLOCK
        self.count("hit" if matched else "miss")
        needed = -(-len(tokens) // BLOCK) - len(matched)
        num_free = pool.num_free
        fresh = pool.allocate(needed)
        assert (fresh is None) == (needed > num_free)
        if fresh is None:
            assert pool.num_free == num_free
            pool.release(matched)
            self.count("full")
            return False
        assert pool.num_free == num_free - needed
        request.blocks = matched + fresh
        self.running.append(request)
        return True

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 99), num_tokens=st.integers(1, 15))
    def compute(self, number: int, num_tokens: int) -> None:
        """A chunk of prefill, or some decode steps; full blocks are published."""
        self.advance(self.pick(number), num_tokens)

    def advance(self, request: Running, num_tokens: int) -> None:
        if request.num_computed < len(request.tokens):
            self.write(request, num_tokens)
            return
        for _ in range(num_tokens):
            if not self.grow(request):
                return
            self.write(request, 1)

    def write(self, request: Running, num_tokens: int) -> None:
        end = min(request.num_computed + num_tokens, len(request.tokens))
        for block in request.blocks[request.num_computed // BLOCK : -(-end // BLOCK)]:
            holders = sum(block in other.blocks for other in self.running)
            assert holders == 1, "a block is written that another request reads"
            assert block in self.owner.holdings(self.pools[request.client]._client).leased
        for token in range(request.num_computed, end):
            self.contents[request.blocks[token // BLOCK]] = request.content(token + 1)
        request.num_computed = end
        self.publish(request)

    def grow(self, request: Running) -> bool:
        if len(request.tokens) == len(request.blocks) * BLOCK:
            block = self.pools[request.client].allocate(1)
            if block is None:
                assert self.pools[request.client].num_free == 0
                victim = next(other for other in reversed(self.running) if other.client == request.client)
                self.take_back(victim)
                return False
            request.blocks += block
        request.tokens = [*request.tokens, request.tokens[-1]]
        return True

    def publish(self, request: Running) -> None:
        pool = self.pools[request.client]
        hashes = pool.hasher.chain(request.salt, request.tokens[: request.num_computed], BLOCK)
        for i in range(request.num_published, len(hashes)):
            parent = request.blocks[i - 1] if i else NO_BLOCK
            if pool.publish(request.blocks[i], hashes[i], parent):
                assert request.epoch == self.epochs[FINGERPRINTS[request.client]], "content from before a flush"
                self.count("published")
            else:
                self.count("kept private")
        request.num_published = len(hashes)

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 99))
    def fork(self, number: int) -> None:
        parent = self.pick(number)
        pool = self.pools[parent.client]
        num_full, tail = divmod(parent.num_computed, BLOCK)
        own = pool.allocate(1) if tail else []
        if own is None:
            return
        shared = parent.blocks[:num_full]
        if own:
            pool.fork(shared, (parent.blocks[num_full], own[0]))
            self.contents[own[0]] = self.contents[parent.blocks[num_full]]
        else:
            pool.fork(shared)
        # A choice without a single token would be another request.
        if not parent.num_computed:
            return
        self.count("forked")
        tokens = parent.tokens[: parent.num_computed]
        published = min(parent.num_published, num_full)
        self.running.append(dataclasses.replace(parent, tokens=tokens, blocks=shared + own, num_published=published))

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 99))
    def abort(self, number: int) -> None:
        self.finish(self.pick(number))

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 99))
    def preempt(self, number: int) -> None:
        self.take_back(self.pick(number))

    def take_back(self, request: Running) -> None:
        self.finish(request)
        self.waiting.append((request.client, request.salt, request.tokens))
        self.count("preempted")

    @rule(client=st.integers(0, 2), chance=st.sampled_from(range(12)))
    def flush(self, client: int, chance: int) -> None:
        if chance == 5:
            self.pools[client].flush()
            self.epochs[FINGERPRINTS[client]] += 1
            assert not self.pools[client].peek(self.some_hashes(client)).num_matched
            self.count("flushed")

    def some_hashes(self, client: int) -> list[bytes]:
        return self.pools[client].hasher.chain(b"", [1] * BLOCK * 2, BLOCK)

    @rule(client=st.integers(0, 2), chance=st.sampled_from(range(12)))
    def die(self, client: int, chance: int) -> None:
        """A replica is gone without a word, and another takes its place."""
        if chance == 5:
            self.owner.detach(self.pools[client]._client)
            self.running = [request for request in self.running if request.client != client]
            self.pools[client] = self.attach(client)
            self.count("died")

    @rule(tokens=PROMPTS)
    def look_up(self, tokens: list[int]) -> None:
        found = self.owner.lookup(self.probe, self.pools[0].hasher.chain(b"", tokens, BLOCK))
        self.looked_up += [(entry, self.contents[entry[0]]) for entry in found]

    @precondition(lambda self: self.looked_up)
    @rule(number=st.integers(0, 99))
    def pin_late(self, number: int) -> None:
        """A pin that was decided on a while ago hits the same content or is refused."""
        entry, content = self.looked_up.pop(number % len(self.looked_up))
        if self.owner.pin(self.probe, [entry]):
            assert self.contents[entry[0]] == content
            self.owner.unpin(self.probe, [entry[0]])
            self.count("pinned late")
        else:
            self.count("pin refused")

    @invariant()
    def ledger_is_sound(self) -> None:
        if not hasattr(self, "pools"):
            return
        LedgerMachine.num_steps += 1
        self.owner.check()
        held = Counter((request.client, block) for request in self.running for block in request.blocks)
        for client, pool in enumerate(self.pools):
            pool.check()
            assert {(client, block): count for block, count in enumerate(pool._refs) if count} == {
                key: count for key, count in held.items() if key[0] == client
            }
        num_held = len({block for _, block in held})
        assert self.owner.num_free + num_held + sum(len(pool._reserve) for pool in self.pools) == self.owner.num_total
        stats = self.owner.stats()
        assert stats.num_released_prompts <= max(self.limits[:2]) + self.limits[2]

    def teardown(self) -> None:
        if not hasattr(self, "pools"):
            return
        for request in list(self.running):
            self.finish(request)
        for pool in self.pools:
            assert pool.num_free == pool.num_total
            pool.close()
        self.owner.check()


def run(max_examples: int, step_count: int) -> None:
    LedgerMachine.num_steps = 0
    LedgerMachine.seen.clear()
    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=step_count,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_operations() -> None:
    run(max_examples=160, step_count=100)
    assert LedgerMachine.num_steps >= 10_000
    wanted = {"hit", "miss", "full", "published", "kept private", "forked", "preempted", "flushed", "died"}
    assert wanted | {"pinned late", "pin refused"} <= LedgerMachine.seen.keys()


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_many_random_operations() -> None:
    run(max_examples=2000, step_count=200)
    assert LedgerMachine.num_steps >= 300_000
