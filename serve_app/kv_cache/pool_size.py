"""How many blocks the KV pool gets."""

import math

import torch

from serve_app.errors import LaunchError
from serve_app.kv_cache.free_memory import free_memory_bytes
from serve_app.options import EngineConfig

DEFAULT_FRACTION = 0.25
"""Of the free main memory, which other programs share."""
DEFAULT_GPU_FRACTION = 0.9
"""Of a GPU's memory, which is the engine's alone: what is left is for activations, graphs and libraries."""
_OPTIONS = {"pool_mb": "--pa-gpu-mem", "pool_fraction": "--pa-gpu-mem-usage", "pool_tokens": "--pa-ctxt-len"}


def gpu_memory(device: torch.device | str) -> tuple[int, int] | None:
    """Free and total bytes of a CUDA device; None for the CPU."""
    device = torch.device(device)
    return None if device.type != "cuda" else torch.cuda.mem_get_info(device)


def num_pool_blocks(
    config: EngineConfig,
    bytes_per_block: int,
    context_tokens: int,
    free_bytes: int | None = None,
    *,
    gpu_bytes: int | None = None,
    num_tables: int = 1,
) -> int:
    """Blocks of the pool: what the options ask for; else on a GPU all but a tenth of its memory, and on the CPU the
    smaller of a quarter of the free memory and max_seqs * context.

    bytes_per_block is KvPool.bytes_per_block's; context_tokens the longest request that the model allows, or the tokens
    of as many blocks as that holds; num_tables: blocks that it takes to keep the same tokens in all layers; free_bytes
    what may be taken on the pool's device (None: the main memory that the cgroup leaves). gpu_bytes: all memory of the
    GPU, None on the CPU; a fraction then counts what is in use already, weights above all, besides the pool. No request
    can be longer than blocks * block_size tokens: the engine limits the context to that. Raises LaunchError, naming the
    option, for contradictory or impossible sizes.
    """
    free = free_memory_bytes() if free_bytes is None else free_bytes
    if config.block_size < 16 or config.block_size % 16:
        raise LaunchError(f"--pa-blk-size must be a multiple of 16, not {config.block_size}")
    _check_options(config)
    per_context = math.ceil(context_tokens / config.block_size)
    fraction = config.pool_fraction
    if config.pool_mb is not None:
        blocks = config.pool_mb * 2**20 // bytes_per_block
    elif config.pool_tokens is not None:
        blocks = math.ceil(config.pool_tokens / config.block_size) * num_tables
    elif gpu_bytes is not None:
        usable = int(gpu_bytes * (DEFAULT_GPU_FRACTION if fraction is None else fraction))
        blocks = max(0, free - (gpu_bytes - usable)) // bytes_per_block
    elif fraction is not None:
        blocks = int(free * fraction) // bytes_per_block
    else:
        blocks = min(int(free * DEFAULT_FRACTION) // bytes_per_block, config.max_seqs * per_context)
    _check_fit(config, blocks, bytes_per_block, free)
    return blocks


def _given(config: EngineConfig) -> list[str]:
    return [option for name, option in _OPTIONS.items() if getattr(config, name) is not None]


def _check_options(config: EngineConfig) -> None:
    given = _given(config)
    if len(given) > 1:
        raise LaunchError(f"{' and '.join(given)} contradict each other: give only one of them")
    if config.pool_mb is not None and config.pool_mb <= 0:
        raise LaunchError(f"--pa-gpu-mem must be a positive number of MB, not {config.pool_mb}")
    if config.pool_fraction is not None and not 0 < config.pool_fraction <= 1:
        raise LaunchError(f"--pa-gpu-mem-usage must be over 0 and at most 1, not {config.pool_fraction}")
    if config.pool_tokens is not None and config.pool_tokens <= 0:
        raise LaunchError(f"--pa-ctxt-len must be a positive number of tokens, not {config.pool_tokens}")
    if config.pa_cache_type != "auto" and config.kv_cache_dtype not in ("auto", config.pa_cache_type):
        raise LaunchError(
            f"--pa-cache-type {config.pa_cache_type} and --kv-cache-dtype {config.kv_cache_dtype} contradict each "
            "other: give only one of them"
        )


def _check_fit(config: EngineConfig, blocks: int, bytes_per_block: int, free: int) -> None:
    asked = next(iter(_given(config)), None)
    if blocks < 1:
        reason = f"{asked} is too small" if asked else f"{_mb(free)} of free memory are too few"
        raise LaunchError(f"{reason}: one block of {config.block_size} tokens takes {_mb(bytes_per_block)}")
    if blocks * bytes_per_block > free:
        raise LaunchError(f"{asked} asks for a KV pool of {_mb(blocks * bytes_per_block)}, but {_mb(free)} are free")


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MB"
