"""How a step's attention is cut into programs: from its shapes alone, once for all layers."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.gpu.support import num_cores

# The smallest side of a matrix that tensor cores multiply.
SMALLEST_TILE = 16
SHARED_BYTES = 56 << 10
"""Of a program that waits for memory: several of them share a multiprocessor."""
MOST_BUFFERS = 4
PROGRAMS_PER_CORE = 2
LONGEST_PART = 8192
"""Keys that one program goes through at most, so that one long context does not keep a whole step waiting."""
MOST_PARTS = 128


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sides of a program's tiles: rows (queries times query heads of a KV head) and keys; and how it is compiled."""

    queries: int
    rows: int
    keys: int
    width: int
    num_warps: int
    num_stages: int


def choose_tiles(max_query_len: int, group: int, head_dim: int, itemsize: int) -> Tiles:
    """The tiles for requests of up to max_query_len queries each.

    group: query heads of a KV head; they share a tile, since they read the same keys. itemsize: bytes of an element
    as it is multiplied. Decodes take few rows and short runs of keys, of which several are on their way at a time: they
    wait for memory. Prefills take many rows: each key that was read is used for all of them.

    A tile's address comes from the block table, so that two loads follow each other: Triton's pipeline of n stages then
    has (n - 1) // 2 tiles under way.
    """
    width = max(SMALLEST_TILE, triton.next_power_of_2(head_dim))
    wanted = min(max_query_len * group, 64 if width <= 128 else 32)
    rows = max(SMALLEST_TILE, triton.next_power_of_2(wanted), triton.next_power_of_2(group))
    row_bytes = width * itemsize
    if rows > 16 and row_bytes <= 256:
        return Tiles(rows // group, rows, keys=64, width=width, num_warps=4, num_stages=3)
    keys = 32 if row_bytes <= 512 else 16
    buffers = max(1, min(MOST_BUFFERS, SHARED_BYTES // (2 * keys * row_bytes)))
    return Tiles(rows // group, rows, keys, width, num_warps=4, num_stages=2 * buffers + 1)


class AttentionPlan:
    """One step's cut, for all layers that have its head counts.

    tile_request int32 [tiles]: which request a tile of queries belongs to; None where each request is one tile.
    """

    def __init__(
        self,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        num_tokens: int,
        max_query_len: int,
        block_size: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        itemsize: int,
    ) -> None:
        """block_tables int32 [R, blocks], query_start int32 [R + 1], context_lens int32 [R], on the device.

        max_query_len bounds what query_start says; it and the shapes alone decide how many programs there are.
        """
        self.block_tables = block_tables
        self.query_start = query_start
        self.context_lens = context_lens
        self.num_tokens = num_tokens
        self.block_size = block_size
        self.tiles = choose_tiles(max_query_len, n_heads // n_kv_heads, head_dim, itemsize)
        num_requests = len(context_lens)
        self.tile_request: Tensor | None = None
        self.num_tiles = num_requests
        if max_query_len > self.tiles.queries:
            # Each request may leave one tile incomplete.
            self.num_tiles = num_tokens // self.tiles.queries + num_requests
            self.tile_request = self._requests_of_tiles()
        self.num_parts = _num_parts(
            self.num_tiles * n_kv_heads,
            block_tables.shape[1] * block_size,
            self.tiles.keys,
            num_cores(block_tables.device),
        )

    def _requests_of_tiles(self) -> Tensor:
        """Request r has the tiles from query_start[r] // queries + r on: enough for any begin and length."""
        queries, device = self.tiles.queries, self.query_start.device
        starts = self.query_start[:-1] // queries + torch.arange(len(self.context_lens), device=device)
        tiles = torch.arange(self.num_tiles, device=device)
        return (torch.searchsorted(starts, tiles, right=True) - 1).to(torch.int32)


def _num_parts(programs: int, most_keys: int, tile_keys: int, cores: int) -> int:
    """Parts that each context is cut into, so that a small batch keeps the device busy and a long context is shared."""
    for_cores = -(-PROGRAMS_PER_CORE * cores // max(1, programs))
    for_length = -(-most_keys // LONGEST_PART)
    return max(1, min(max(for_cores, for_length), -(-most_keys // tile_keys), MOST_PARTS))
