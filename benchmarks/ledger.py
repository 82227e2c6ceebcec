"""Nanoseconds a block for each operation of the block ledger: `python benchmarks/ledger.py`. The best of ten rounds."""

import time
from collections import defaultdict
from collections.abc import Callable

from serve_app.kv_cache.block_ledger import NO_BLOCK
from serve_app.kv_cache.block_pool import BlockPool
from serve_app.kv_cache.local_owner import LocalOwner

NUM_BLOCKS = 8192
BLOCK_SIZE = 32
ROUNDS = 10
PER_REQUEST = (1, 8, 64, 512)


class Clock:
    """Keeps the best time of each named operation, in ns a block."""

    def __init__(self, num_blocks: int) -> None:
        self.best: dict[str, float] = defaultdict(lambda: float("inf"))
        self._num_blocks = num_blocks

    def measure(self, name: str, operation: Callable[[], object]) -> None:
        start = time.perf_counter_ns()
        operation()
        self.best[name] = min(self.best[name], (time.perf_counter_ns() - start) / self._num_blocks)


def measure(per_request: int) -> dict[str, float]:
    """Half the pool in requests of per_request blocks."""
    pool = BlockPool(LocalOwner(NUM_BLOCKS), b"model", BLOCK_SIZE, NUM_BLOCKS)
    num_requests = NUM_BLOCKS // 2 // per_request
    clock = Clock(num_requests * per_request)
    tokens = list(range(per_request * BLOCK_SIZE))
    tables: list[list[int]] = []

    def allocate() -> None:
        for _ in range(num_requests):
            tables.append(pool.allocate(per_request) or [])

    def release() -> None:
        for table in tables:
            pool.release(table)
        tables.clear()

    def publish() -> None:
        for table, hashes in zip(tables, chains, strict=True):
            parent = NO_BLOCK
            for block, block_hash in zip(table, hashes, strict=True):
                pool.publish(block, block_hash, parent)
                parent = block

    def match() -> None:
        for hashes in chains:
            tables.append(pool.match(hashes))

    def chain() -> list[list[bytes]]:
        return [pool.hasher.chain(b"%d" % i, tokens, BLOCK_SIZE) for i in range(num_requests)]

    chains = chain()
    for _ in range(ROUNDS):
        pool.flush()
        clock.measure("hash", chain)
        clock.measure("allocate", allocate)
        clock.measure("release private", release)
        allocate()
        clock.measure("publish", publish)
        clock.measure("release published", release)
        clock.measure("match", match)
        release()
        rest = pool.allocate(NUM_BLOCKS // 2) or []
        clock.measure("allocate, evicting", allocate)
        release()
        pool.release(rest)
    return clock.best


def main() -> None:
    """Prints a Markdown table, one column for each request size."""
    columns = [measure(per_request) for per_request in PER_REQUEST]
    print("| ns per block | " + " | ".join(f"{n} blocks/request" for n in PER_REQUEST) + " |")
    print("|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.0f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
