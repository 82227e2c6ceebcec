"""Which layers share tables, what those must cover, and the ledger's part in windows."""

import pytest

from serve_app.kv_cache.block_ledger import NO_BLOCK, group_hash
from serve_app.kv_cache.block_pool import BlockPool
from serve_app.kv_cache.layer_groups import KvWindow, LayerGroup, fit_windows, group_layers, longest_request
from serve_app.kv_cache.local_owner import LocalOwner

SIZE = 16


def new_pool(num_blocks: int = 20, prefix_cache_n: int = 8) -> BlockPool:
    return BlockPool(LocalOwner(num_blocks), b"model", SIZE, prefix_cache_n)


def published(pool: BlockPool, hashes: list[bytes], groups: int = 1) -> list[list[int]]:
    """Tables over full blocks of these hashes."""
    tables = []
    for group in range(groups):
        table = pool.allocate(len(hashes))
        assert table is not None
        for i, block in enumerate(table):
            assert pool.publish(block, group_hash(hashes[i], group, groups), table[i - 1] if i else NO_BLOCK)
        tables.append(table)
    return tables


def test_one_kind_of_layer_is_one_group() -> None:
    assert group_layers([0] * 5, 100) == (LayerGroup(0, (0, 1, 2, 3, 4)),)
    assert group_layers([32] * 5, 100) == (LayerGroup(32, (0, 1, 2, 3, 4)),)
    # A window that no request leaves is none.
    assert group_layers([128] * 3, 128) == (LayerGroup(0, (0, 1, 2)),)


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        # Gemma 2 2B; Gemma 3 1B and 4B; Qwen 2 with windows in the upper quarter.
        ((13, 13), [13, 13]),
        ((4, 22), [4, 4, 4, 4, 4, 4, 2]),
        ((5, 29), [5, 5, 5, 5, 5, 5, 4]),
        ((21, 7), [7, 7, 7, 7]),
    ],
)
def test_kinds_of_layers_share_blocks_of_one_size(counts: tuple[int, int], sizes: list[int]) -> None:
    windows = [0] * counts[0] + [512] * counts[1]
    groups = group_layers(windows, 4096)
    assert [len(group.layers) for group in groups] == sizes
    assert sorted(layer for group in groups for layer in group.layers) == list(range(sum(counts)))
    assert all(windows[layer] == group.window for group in groups for layer in group.layers)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 18, 40])
def test_a_table_covers_what_a_chunk_sees(tokens: int) -> None:
    window = KvWindow(tokens, SIZE, 24)
    most = window.most_blocks(10_000)
    seen = []
    for position in range(200):
        first = window.first_block(position)
        assert first * SIZE <= max(0, position - tokens + 1) < (first + 1) * SIZE
        end = -(-(position + 24) // SIZE)
        seen.append(end - window.first_block(max(0, position - 1)))
        if position % SIZE == 0:
            lookback = position // SIZE - first
            assert lookback <= window.num_lookback
    assert max(seen) == most
    assert window.most_blocks(SIZE) == 1
    assert KvWindow(0, SIZE, 24).most_blocks(33) == 3


def test_the_longest_request_and_chunks_that_fit() -> None:
    plain, local = KvWindow(0, SIZE, 64), KvWindow(20, SIZE, 64)
    assert longest_request([plain], 10, 1000) == 160
    assert longest_request([plain], 1000, 100) == 112
    assert longest_request([local], local.most_blocks(5000), 5000) >= 5000
    assert longest_request([plain, local], 20, 5000) == (20 - local.most_blocks(5000)) * SIZE
    assert longest_request([plain, plain], 1, 100) == 0
    # Four blocks hold no chunk of 64 behind a window, but one of 16.
    (fitting,) = fit_windows([LayerGroup(20, (0,))], SIZE, 64, 4, 1000)
    assert fitting.chunk_tokens == 16
    assert longest_request([fitting], 4, 1000) >= 1000
    (fitting,) = fit_windows([LayerGroup(20, (0,))], SIZE, 64, 100, 1000)
    assert fitting.chunk_tokens == 64


def test_a_window_finds_its_last_blocks_by_themselves() -> None:
    pool = new_pool()
    hashes = pool.hasher.chain(b"", range(8 * SIZE), SIZE)
    (table,) = published(pool, hashes[:6])
    pool.release(table)
    pool._owner._drop_hash(table[1], pool._owner._clients[1].space)  # type: ignore[attr-defined]
    pool._owner._queue.remove(table[1])  # type: ignore[attr-defined]
    pool._owner._queue.push_blank([table[1]])  # type: ignore[attr-defined]
    assert pool.peek_tables(hashes).num_matched == 1
    assert pool.peek_tables(hashes, (2,)) == (6, pool.num_free - 2)
    assert pool.peek_tables(hashes, (5,)).num_matched == 1
    assert pool.match_tables(hashes, (2,)) == [[NO_BLOCK] * 4 + table[4:6]]
    pool.check()
    pool.release(table[4:6])
    # A group that needs everything and one that needs two blocks agree on what both have.
    assert pool.match_tables([], (0, 2)) == [[], []]
    pool.close()


def test_groups_agree_on_a_prefix() -> None:
    pool = new_pool(40)
    hashes = pool.hasher.chain(b"", range(8 * SIZE), SIZE)
    whole, local = published(pool, hashes, groups=2)
    pool.release(whole[6:])
    pool.release(local[:3])
    pool.allocate(pool.num_free)
    # Evicted: the whole tables' end, and the local tables' beginning.
    assert pool.peek_tables(hashes, (0, 2)).num_matched == 6
    assert pool.match_tables(hashes, (0, 2)) == [whole[:6], [NO_BLOCK] * 4 + local[4:6]]
    assert pool.peek_tables(hashes[:4], (0, 2)).num_matched == 0
    pool.check()


def test_blocks_given_up_one_by_one_are_one_released_prompt() -> None:
    pool = new_pool(prefix_cache_n=2)
    other = pool.hasher.chain(b"", [7] * SIZE, SIZE)
    pool.release(published(pool, other)[0])
    hashes = pool.hasher.chain(b"", range(8 * SIZE), SIZE)
    (table,) = published(pool, hashes)
    for i in range(5):
        pool.give_up([table[i]], table[i + 1], 1)
        pool._owner.check()  # type: ignore[attr-defined]
    pool.release(table[5:], 1)
    assert pool._owner.stats().num_released_prompts == 2
    assert pool.peek_tables(other).num_matched == 1
    assert pool.peek_tables(hashes).num_matched == 8
    # Two further prompts: now the one that was given up in parts goes, as a whole.
    for token in (8, 9):
        pool.release(published(pool, pool.hasher.chain(b"", [token] * SIZE, SIZE))[0])
    assert pool.peek_tables(hashes).num_matched == 0
    pool._owner.check()  # type: ignore[attr-defined]
    pool.close()


def test_what_follows_blocks_from_before_a_flush_stays_private() -> None:
    """Even where the block that says so was given up before its successor is full."""
    pool = new_pool()
    hashes = pool.hasher.chain(b"", range(4 * SIZE), SIZE)
    (table,) = published(pool, hashes[:2])
    pool.flush()
    table += pool.allocate(2) or []
    pool.give_up(table[:2], table[2], 1)
    assert not pool.publish(table[2], hashes[2], NO_BLOCK)
    assert not pool.publish(table[3], hashes[3], table[2])
    pool.release(table[2:], 1)
    pool.check()
    pool.close()
