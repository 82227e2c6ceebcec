import random

import pytest

from serve_app.kv_cache.block_ledger import NO_BLOCK, BlockLedger
from serve_app.kv_cache.contiguous_pool import ContiguousPool


def test_satisfies_the_ledger_and_shares_nothing() -> None:
    pool: BlockLedger = ContiguousPool(8, 32)
    assert pool.is_contiguous
    table = pool.allocate(2)
    assert table is not None
    hashes = pool.hasher.chain(b"", list(range(64)), 32)
    assert not pool.publish(table[0], hashes[0], NO_BLOCK)
    assert pool.peek_tables(hashes) == (0, 6)
    assert pool.match_tables(hashes) == [[]]
    with pytest.raises(AssertionError, match="one request's alone"):
        pool.fork(table)


def test_takes_the_smallest_range_that_fits() -> None:
    pool = ContiguousPool(16, 32)
    tables = [pool.allocate(n) for n in (4, 1, 2, 1, 8)]
    assert [table[0] for table in tables if table] == [0, 4, 5, 7, 8]
    assert tables[0]
    assert tables[2]
    pool.release(tables[0])
    pool.release(tables[2])
    assert pool.num_free == 6
    assert pool.allocate(5) is None
    assert pool.allocate(2) == [5, 6]
    pool.check()


def test_a_wrong_range_is_an_assertion() -> None:
    pool = ContiguousPool(8, 32)
    table = pool.allocate(4)
    assert table is not None
    with pytest.raises(AssertionError, match="not one request's range"):
        pool.release(table[:2])
    pool.release(table)
    with pytest.raises(AssertionError, match="not one request's range"):
        pool.release(table)
    pool.close()


def test_random_ranges_never_overlap_and_all_come_back() -> None:
    rng = random.Random(5)
    pool = ContiguousPool(64, 32)
    tables: list[list[int]] = []
    for _ in range(3000):
        if tables and rng.random() < 0.5:
            pool.release(tables.pop(rng.randrange(len(tables))))
        else:
            wanted = rng.randint(1, 12)
            table = pool.allocate(wanted)
            if table is None:
                assert largest_gap(tables) < wanted
            else:
                assert table == list(range(table[0], table[0] + wanted))
                tables.append(table)
        held = [block for table in tables for block in table]
        assert len(held) == len(set(held)) == 64 - pool.num_free
        pool.check()
    for table in tables:
        pool.release(table)
    pool.check()
    assert pool.allocate(64) == list(range(64))


def largest_gap(tables: list[list[int]]) -> int:
    held = {block for table in tables for block in table}
    gap = best = 0
    for block in range(64):
        gap = 0 if block in held else gap + 1
        best = max(best, gap)
    return best
