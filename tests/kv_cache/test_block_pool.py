import pytest

from serve_app.kv_cache.block_ledger import NO_BLOCK, BlockLedger
from serve_app.kv_cache.block_pool import BlockPool
from serve_app.kv_cache.local_owner import LocalOwner

SIZE = 16


def make_pool(num_blocks: int = 16, prefix_cache_n: int = 8) -> tuple[BlockPool, LocalOwner]:
    owner = LocalOwner(num_blocks)
    return BlockPool(owner, b"model", SIZE, prefix_cache_n), owner


def hashes_of(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[bytes]:
    return pool.hasher.chain(salt, tokens, SIZE)


def tokens_of(*blocks: int) -> list[int]:
    return [token for token in blocks for _ in range(SIZE)]


def run_prompt(pool: BlockPool, *blocks: int, salt: bytes = b"") -> list[int]:
    """A request of full blocks, each of one token id, up to where all are computed."""
    hashes = hashes_of(pool, tokens_of(*blocks), salt)
    table = pool.match(hashes)
    num_matched = len(table)
    fresh = pool.allocate(len(blocks) - num_matched)
    assert fresh is not None
    table += fresh
    for i in range(num_matched, len(table)):
        pool.publish(table[i], hashes[i], table[i - 1] if i else NO_BLOCK)
    return table


def num_cached(pool: BlockPool, *blocks: int, salt: bytes = b"") -> int:
    return pool.peek(hashes_of(pool, tokens_of(*blocks), salt)).num_matched


def checked(pool: BlockPool, owner: LocalOwner) -> None:
    pool.check()
    owner.check()


def test_satisfies_the_ledger() -> None:
    pool, _ = make_pool()
    ledger: BlockLedger = pool
    assert not ledger.is_contiguous
    assert ledger.is_caching


def test_allocates_all_or_none() -> None:
    pool, owner = make_pool(8)
    held = pool.allocate(5)
    assert held is not None
    assert len(set(held)) == 5
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []
    checked(pool, owner)
    pool.release(held)
    assert pool.num_free == pool.num_total == owner.num_free
    checked(pool, owner)


def test_finds_a_released_prompt_again_and_counts_in_blocks() -> None:
    pool, owner = make_pool()
    table = run_prompt(pool, 1, 2, 3)
    pool.release(table)
    assert pool.num_free == 16
    peek = pool.peek(hashes_of(pool, tokens_of(1, 2, 9)))
    assert peek == (2, 14)
    matched = pool.match(hashes_of(pool, tokens_of(1, 2, 9)))
    assert matched == table[:2]
    assert pool.num_free == peek.num_free_after
    assert (pool.num_lookups, pool.num_hits, pool.num_evictions) == (6, 2, 0)
    checked(pool, owner)


def test_running_requests_share_blocks_that_count_once() -> None:
    pool, owner = make_pool()
    first = run_prompt(pool, 1, 2)
    hashes = hashes_of(pool, tokens_of(1, 2))
    assert pool.peek(hashes) == (2, 14)
    second = pool.match(hashes)
    assert second == first
    assert pool.num_free == 14
    pool.release(first)
    assert pool.num_free == 14
    checked(pool, owner)
    pool.release(second)
    assert pool.num_free == 16
    checked(pool, owner)


def test_salts_separate_tenants() -> None:
    pool, _ = make_pool()
    pool.release(run_prompt(pool, 1, 2, salt=b"alice"))
    assert num_cached(pool, 1, 2, salt=b"alice") == 2
    assert num_cached(pool, 1, 2, salt=b"bob") == 0
    assert num_cached(pool, 1, 2) == 0


def test_keeps_at_most_n_released_prompts() -> None:
    pool, owner = make_pool(32, prefix_cache_n=2)
    for prompt in range(4):
        pool.release(run_prompt(pool, prompt, 100 + prompt))
        checked(pool, owner)
    assert [num_cached(pool, prompt, 100 + prompt) for prompt in range(4)] == [0, 0, 2, 2]
    assert owner.stats().num_retired_prompts == 2
    assert pool.num_evictions == 0


def test_blocks_shared_by_released_prompts_count_with_the_last_of_them() -> None:
    pool, owner = make_pool(32, prefix_cache_n=2)
    pool.release(run_prompt(pool, 1, 2))
    pool.release(run_prompt(pool, 1, 3))
    pool.release(run_prompt(pool, 1, 4))
    # The oldest lost what was its own alone.
    assert (num_cached(pool, 1, 2), num_cached(pool, 1, 3), num_cached(pool, 1, 4)) == (1, 2, 2)
    checked(pool, owner)


def test_the_same_prompt_again_is_one_released_prompt() -> None:
    pool, owner = make_pool(32, prefix_cache_n=2)
    pool.release(run_prompt(pool, 9, 8))
    for _ in range(5):
        pool.release(run_prompt(pool, 1, 2))
    assert owner.stats().num_released_prompts == 2
    assert num_cached(pool, 9, 8) == 2
    checked(pool, owner)


def test_a_retired_prompt_keeps_what_a_running_request_shares() -> None:
    pool, owner = make_pool(32, prefix_cache_n=1)
    pool.release(run_prompt(pool, 1, 2, 3))
    reader = pool.match(hashes_of(pool, tokens_of(1, 2)))
    pool.release(run_prompt(pool, 7))
    assert num_cached(pool, 1, 2, 3) == 2
    checked(pool, owner)
    pool.release(reader)
    assert (num_cached(pool, 1, 2, 3), num_cached(pool, 7)) == (2, 0)
    checked(pool, owner)


def test_retired_blocks_are_reused_before_cached_ones() -> None:
    pool, owner = make_pool(6, prefix_cache_n=1)
    pool.release(run_prompt(pool, 1, 2, 3))
    pool.release(run_prompt(pool, 4, 5, 6))
    assert pool.allocate(3) is not None
    assert pool.num_evictions == 0
    assert num_cached(pool, 4, 5, 6) == 3
    checked(pool, owner)


def test_evicts_the_end_of_the_oldest_prompt_first() -> None:
    pool, owner = make_pool(6)
    pool.release(run_prompt(pool, 1, 2, 3))
    pool.release(run_prompt(pool, 4, 5, 6))
    pool.match(hashes_of(pool, tokens_of(4)))
    assert pool.allocate(2) is not None
    assert (num_cached(pool, 1, 2, 3), num_cached(pool, 4, 5, 6)) == (1, 3)
    assert pool.num_evictions == 2
    checked(pool, owner)


def test_a_hash_that_exists_leaves_the_second_block_private() -> None:
    pool, owner = make_pool()
    hashes = hashes_of(pool, tokens_of(1))
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    assert pool.publish(first[0], hashes[0], NO_BLOCK)
    assert not pool.publish(second[0], hashes[0], NO_BLOCK)
    assert pool.publish(first[0], hashes[0], NO_BLOCK)
    checked(pool, owner)
    pool.release(second)
    assert pool.match(hashes) == first
    checked(pool, owner)


def test_without_prefix_cache_nothing_is_published() -> None:
    pool, owner = make_pool(prefix_cache_n=0)
    pool.release(run_prompt(pool, 1, 2))
    assert not pool.is_caching
    assert num_cached(pool, 1, 2) == 0
    assert pool.match(hashes_of(pool, tokens_of(1, 2))) == []
    assert owner.stats().num_cached == 0
    checked(pool, owner)


def test_fork_counts_holders() -> None:
    pool, owner = make_pool()
    table = run_prompt(pool, 1, 2)
    pool.fork(table)
    pool.release(table)
    assert pool.num_free == 14
    checked(pool, owner)
    pool.release(table)
    assert pool.num_free == 16
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.fork(table)


def test_a_double_release_is_an_assertion() -> None:
    pool, _ = make_pool()
    table = pool.allocate(2)
    assert table is not None
    pool.release(table)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(table)


def test_nothing_of_before_a_flush_is_found_or_published() -> None:
    pool, owner = make_pool()
    running = run_prompt(pool, 1, 2)
    pool.release(run_prompt(pool, 3))
    pool.flush()
    assert (num_cached(pool, 1, 2), num_cached(pool, 3)) == (0, 0)
    checked(pool, owner)
    # The running request grows: what it computes rests on K and V from before the flush, to its end.
    hashes = hashes_of(pool, tokens_of(1, 2, 5, 6))
    for i in (2, 3):
        running += pool.allocate(1) or []
        assert not pool.publish(running[i], hashes[i], running[i - 1])
    # Another one begins after the flush.
    fresh = run_prompt(pool, 1, 2)
    assert not set(fresh) & set(running)
    assert num_cached(pool, 1, 2) == 2
    checked(pool, owner)
    pool.release(running)
    pool.release(fresh)
    assert pool.num_free == 16
    checked(pool, owner)


def test_a_copied_tail_of_before_the_flush_is_not_published() -> None:
    pool, _ = make_pool()
    tail = pool.allocate(1)
    pool.flush()
    own = pool.allocate(1)
    assert tail is not None
    assert own is not None
    pool.fork([], (tail[0], own[0]))
    pool.release(tail)
    assert not pool.publish(own[0], hashes_of(pool, tokens_of(1))[0], NO_BLOCK)


def test_another_replica_notices_the_flush() -> None:
    owner = LocalOwner(16)
    one, two = BlockPool(owner, b"model", SIZE, 4), BlockPool(owner, b"model", SIZE, 4)
    block = two.allocate(1)
    assert block is not None
    one.flush()
    assert not two.publish(block[0], hashes_of(two, tokens_of(1))[0], NO_BLOCK)


def test_replicas_share_published_blocks() -> None:
    owner = LocalOwner(16)
    one, two = BlockPool(owner, b"model", SIZE, 4), BlockPool(owner, b"model", SIZE, 4)
    mine = run_prompt(one, 1, 2)
    theirs = two.match(hashes_of(two, tokens_of(1, 2)))
    assert theirs == mine
    one.release(mine)
    one.close()
    checked(two, owner)
    assert two.num_free == 14
    two.release(theirs)
    assert two.num_free == 16


def test_an_idle_replica_holds_no_reserve_and_a_short_owner_gets_it_back() -> None:
    owner = LocalOwner(256)
    one, two = BlockPool(owner, b"model", SIZE, 4), BlockPool(owner, b"model", SIZE, 4)
    first, second = one.allocate(1), one.allocate(3)
    assert first is not None
    assert second is not None
    assert owner.num_free < 252
    assert two.allocate(250) is None
    one.release(second)
    assert two.num_free == 255
    one.release(first)
    assert two.num_free == 256
    checked(one, owner)


def test_closing_with_held_blocks_is_an_assertion() -> None:
    pool, owner = make_pool()
    table = pool.allocate(1)
    assert table is not None
    with pytest.raises(AssertionError, match="still held"):
        pool.close()
    pool.release(table)
    pool.close()
    assert owner.stats().num_clients == 0
