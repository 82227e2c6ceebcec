from dataclasses import replace
from typing import Any

import pytest

from serve_app.errors import LaunchError
from serve_app.kv_cache.pool_size import gpu_memory, num_pool_blocks
from serve_app.options import EngineConfig

CONFIG = EngineConfig(max_seqs=4, block_size=32)
MB = 2**20


def test_default_is_the_smaller_of_a_quarter_of_the_memory_and_all_contexts() -> None:
    assert num_pool_blocks(CONFIG, bytes_per_block=MB, context_tokens=100, free_bytes=4000 * MB) == 4 * 4
    assert num_pool_blocks(CONFIG, bytes_per_block=MB, context_tokens=100_000, free_bytes=4000 * MB) == 1000


def test_each_option_sets_the_size() -> None:
    def blocks(config: EngineConfig) -> int:
        return num_pool_blocks(config, bytes_per_block=MB, context_tokens=100, free_bytes=4000 * MB)

    assert blocks(replace(CONFIG, pool_mb=77)) == 77
    assert blocks(replace(CONFIG, pool_fraction=0.5)) == 2000
    assert blocks(replace(CONFIG, pool_tokens=65)) == 3


def test_on_a_gpu_the_fraction_is_of_all_memory_with_what_is_in_use() -> None:
    def blocks(config: EngineConfig) -> int:
        return num_pool_blocks(config, MB, context_tokens=100, free_bytes=6000 * MB, gpu_bytes=10_000 * MB)

    assert blocks(CONFIG) == 5000
    assert blocks(replace(CONFIG, pool_fraction=0.5)) == 1000
    assert blocks(replace(CONFIG, pool_fraction=1.0)) == 6000
    assert blocks(replace(CONFIG, pool_mb=77)) == 77
    assert blocks(replace(CONFIG, pool_tokens=65)) == 3
    with pytest.raises(LaunchError, match="--pa-gpu-mem-usage is too small"):
        blocks(replace(CONFIG, pool_fraction=0.3))
    with pytest.raises(LaunchError, match="few"):
        num_pool_blocks(CONFIG, MB, context_tokens=100, free_bytes=900 * MB, gpu_bytes=10_000 * MB)


def test_there_is_no_gpu_memory_on_a_cpu() -> None:
    assert gpu_memory("cpu") is None


def test_takes_the_memory_of_this_machine_by_default() -> None:
    assert num_pool_blocks(replace(CONFIG, pool_tokens=64), bytes_per_block=1024, context_tokens=64) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pool_mb": 1, "pool_fraction": 0.5}, ["--pa-gpu-mem ", "--pa-gpu-mem-usage"]),
        ({"pool_mb": 1, "pool_tokens": 64}, ["--pa-gpu-mem ", "--pa-ctxt-len"]),
        ({"pool_fraction": 0.5, "pool_tokens": 64}, ["--pa-gpu-mem-usage", "--pa-ctxt-len"]),
        ({"pool_mb": 0}, ["--pa-gpu-mem ", "0"]),
        ({"pool_fraction": 0.0}, ["--pa-gpu-mem-usage", "0.0"]),
        ({"pool_fraction": 1.5}, ["--pa-gpu-mem-usage", "1.5"]),
        ({"pool_fraction": float("nan")}, ["--pa-gpu-mem-usage", "nan"]),
        ({"pool_tokens": -5}, ["--pa-ctxt-len", "-5"]),
        ({"pool_mb": 5000}, ["--pa-gpu-mem ", "5000.0 MB", "4000.0 MB"]),
        ({"pool_tokens": 10_000_000}, ["--pa-ctxt-len", "4000.0 MB"]),
        ({"pa_cache_type": "f8e4m3", "kv_cache_dtype": "q8"}, ["--pa-cache-type f8e4m3", "--kv-cache-dtype q8"]),
        ({"block_size": 8}, ["--pa-blk-size", "8"]),
        ({"block_size": 40}, ["--pa-blk-size", "40"]),
    ],
)
def test_contradictory_or_impossible_sizes_name_the_options(changes: dict[str, Any], named: list[str]) -> None:
    config = replace(CONFIG, **changes)
    with pytest.raises(LaunchError) as caught:
        num_pool_blocks(config, bytes_per_block=MB, context_tokens=100, free_bytes=4000 * MB)
    assert all(part in str(caught.value) for part in named), str(caught.value)


def test_memory_for_less_than_one_block_is_refused() -> None:
    with pytest.raises(LaunchError, match="free memory"):
        num_pool_blocks(CONFIG, bytes_per_block=MB, context_tokens=100, free_bytes=MB)
    with pytest.raises(LaunchError, match="--pa-gpu-mem is too small"):
        num_pool_blocks(replace(CONFIG, pool_mb=1), bytes_per_block=2 * MB, context_tokens=100, free_bytes=100 * MB)
