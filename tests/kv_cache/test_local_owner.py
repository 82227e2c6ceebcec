from serve_app.kv_cache.local_owner import LocalOwner
from serve_app.kv_cache.owner import CacheOwner


def attached(num_blocks: int, max_released: int = 8) -> tuple[LocalOwner, int]:
    owner = LocalOwner(num_blocks)
    return owner, owner.attach(b"model", max_released).client


def published(owner: CacheOwner, client: int, hashes: list[bytes]) -> list[int]:
    leased = owner.lease(client, len(hashes), len(hashes))
    for (block, generation), block_hash in zip(leased, hashes, strict=True):
        assert owner.publish(client, block, generation, block_hash)
    return [block for block, _ in leased]


def test_satisfies_the_protocol() -> None:
    owner: CacheOwner = LocalOwner(4)
    assert owner.num_total == owner.num_free == 4


def test_the_hash_key_is_random_and_the_same_for_all_clients() -> None:
    owner, other = LocalOwner(4), LocalOwner(4)
    keys = {owner.attach(b"a", 1).hash_key, owner.attach(b"b", 1).hash_key}
    assert len(keys) == 1
    assert other.attach(b"a", 1).hash_key not in keys


def test_a_lease_is_all_or_nothing_and_its_surplus_evicts_nothing() -> None:
    owner, client = attached(6)
    owner.unpin(client, published(owner, client, [b"0", b"1", b"2", b"3"]))
    assert len(owner.lease(client, 1, 6)) == 2
    assert owner.stats().num_cached == 4
    assert owner.lease(client, 5, 5) == []
    was_short = owner.is_short
    assert len(owner.lease(client, 3, 6)) == 3
    assert (was_short, owner.is_short) == (True, False)
    assert owner.num_evictions == 3
    owner.check()


def test_eviction_takes_the_least_recent_prompt_and_its_last_block_first() -> None:
    owner, client = attached(4)
    first = published(owner, client, [b"a0", b"a1"])
    second = published(owner, client, [b"b0", b"b1"])
    owner.unpin(client, second)
    owner.unpin(client, first)
    order = [owner.lease(client, 1, 1)[0][0] for _ in range(4)]
    assert order == [second[1], second[0], first[1], first[0]]
    owner.check()


def test_a_pin_of_another_life_is_refused() -> None:
    owner, client = attached(2)
    reader = owner.attach(b"model", 8).client
    blocks = published(owner, client, [b"0", b"1"])
    found = owner.lookup(reader, [b"0", b"1"])
    assert [block for block, _ in found] == blocks
    owner.unpin(client, blocks)
    # The second block is overwritten and gets the same hash again, in another life.
    [(block, generation)] = owner.lease(client, 1, 1)
    assert block == blocks[1]
    assert owner.pin(reader, found) == 1
    assert owner.publish(client, block, generation, b"1")
    assert owner.pin(reader, found) == 1
    assert owner.pin(reader, owner.lookup(reader, [b"0", b"1"])) == 2
    owner.check()


def test_publishing_a_hash_that_exists_keeps_the_block_private() -> None:
    owner, client = attached(3)
    [first] = published(owner, client, [b"0"])
    [(second, generation)] = owner.lease(client, 1, 1)
    assert not owner.publish(client, second, generation, b"0")
    assert owner.lookup(client, [b"0"])[0][0] == first
    owner.give_back(client, [second])
    owner.check()


def test_a_stale_or_foreign_lease_cannot_publish() -> None:
    owner, client = attached(2)
    other = owner.attach(b"model", 8).client
    [(block, generation)] = owner.lease(client, 1, 1)
    assert not owner.publish(other, block, generation, b"0")
    assert not owner.publish(client, block, generation - 1, b"0")
    owner.give_back(client, [block])
    assert not owner.publish(client, block, generation, b"0")
    owner.check()


def test_fingerprints_do_not_see_each_other() -> None:
    owner, client = attached(4)
    draft = owner.attach(b"draft", 8).client
    published(owner, client, [b"0"])
    assert owner.lookup(draft, [b"0"]) == []
    published(owner, draft, [b"0"])
    owner.flush(draft)
    assert owner.lookup(draft, [b"0"]) == []
    assert len(owner.lookup(client, [b"0"])) == 1
    assert (owner.flush_count(client), owner.flush_count(draft)) == (0, 1)
    owner.check()


def test_a_dead_client_loses_pins_and_leases_but_not_what_it_published() -> None:
    owner, client = attached(6)
    other = owner.attach(b"model", 8).client
    blocks = published(owner, client, [b"0", b"1"])
    owner.lease(client, 3, 3)
    assert owner.pin(other, owner.lookup(other, [b"0"])) == 1
    owner.detach(client)
    owner.check()
    assert owner.num_free == 5
    assert not owner.is_free(blocks[0])
    assert len(owner.lookup(other, [b"0", b"1"])) == 2


def test_a_flush_leaves_pinned_blocks_with_their_readers() -> None:
    owner, client = attached(4)
    blocks = published(owner, client, [b"0", b"1", b"2"])
    owner.unpin(client, blocks[2:])
    found = owner.lookup(client, [b"0"])
    owner.flush(client)
    owner.check()
    assert owner.stats().num_cached == 0
    assert owner.holdings(client).pinned == set(blocks[:2])
    assert owner.pin(client, found) == 0
    owner.unpin(client, blocks[:2])
    owner.check()
    assert owner.num_free == 4
