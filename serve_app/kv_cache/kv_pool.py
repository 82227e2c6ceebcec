"""The K and V tensors of all layers, as views over an arena."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from serve_app.kv_cache.arena import Arena

# A page apart from the data, which then starts page-aligned.
HEADER_BYTES = 4096
_HEADER = struct.Struct("<8sIQIIII16s")
_MAGIC = b"siroccKV"
_VERSION = 1


Groups: TypeAlias = Sequence[Sequence[int]]
"""The numbers of the layers of each group that has block tables of its own."""

Q8_BLOCK = 32
"""Elements of a q8 row that share a scale."""


def row_elements(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that one head of one token takes. uint8 stands for q8 rows: int8 values, then float16 scales."""
    return head_dim + 2 * -(-head_dim // Q8_BLOCK) if dtype == torch.uint8 else head_dim


def kv_dtype_name(dtype: torch.dtype) -> str:
    """How users call it."""
    names = {torch.uint8: "q8", torch.float8_e4m3fn: "f8e4m3"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What two processes must agree on before they share a pool. dtype uint8: q8 rows, see row_elements.

    n_layers: those that a block has room for: all of the model, or the largest group of layers."""

    num_blocks: int
    block_size: int
    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Of one block in all its layers, K and V."""
        elements = self.n_layers * 2 * self.block_size * self.n_kv_heads * row_elements(self.head_dim, self.dtype)
        return elements * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Of the arena."""
        return HEADER_BYTES + self.num_blocks * self.bytes_per_block

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole pool: [layer, K or V, block, slot in block, head, element of a row]."""
        row = row_elements(self.head_dim, self.dtype)
        return (self.n_layers, 2, self.num_blocks, self.block_size, self.n_kv_heads, row)

    def header(self) -> bytes:
        """These facts as they stand at the head of the arena."""
        name = str(self.dtype).removeprefix("torch.").encode()
        sizes = (self.num_blocks, self.block_size, self.n_layers, self.n_kv_heads, self.head_dim)
        return _HEADER.pack(_MAGIC, _VERSION, *sizes, name)


class KvPool:
    """K and V of every block: k[layer] and v[layer] are [num_blocks, block_size, n_kv_heads, row_elements].

    groups: by layer, the number of the group whose block tables say which blocks are the layer's. Layers of different
    groups may lie in the same memory: they never have the same block. Slot s of the pool (slot = block id * block_size
    + offset) is row s of k[layer].view(-1, n_kv_heads, row_elements). The pool owns its arena. The views are contiguous
    and zero at first.

    k_scales, v_scales: for float8_e4m3fn, by layer, what a head's numbers are multiplied with, float32 [n_kv_heads], 1
    at first; None for all other dtypes. They must not change once something was written.
    """

    def __init__(self, data: Tensor, geometry: KvGeometry, arena: Arena | None = None, groups: Groups = ()) -> None:
        """Lays the views over data [geometry.num_bytes - HEADER_BYTES] bytes. Use create(), attach(), on_device()."""
        self.geometry = geometry
        self._arena = arena
        self._data = data.view(geometry.dtype).view(geometry.shape)
        groups = groups or [range(geometry.n_layers)]
        # (group, place in a block) of each layer
        homes = {layer: (group, place) for group, layers in enumerate(groups) for place, layer in enumerate(layers)}
        self.groups = tuple(homes[layer][0] for layer in range(len(homes)))
        places = [homes[layer][1] for layer in range(len(homes))]
        self.k: list[Tensor] = [self._data[place, 0] for place in places]
        self.v: list[Tensor] = [self._data[place, 1] for place in places]
        self.k_scales, self.v_scales = (_scales(geometry, len(homes), data.device) for _ in "kv")

    @classmethod
    def create(
        cls,
        arena_factory: Callable[[int], Arena],
        num_blocks: int,
        block_size: int,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        groups: Groups = (),
    ) -> "KvPool":
        """A zeroed pool; arena_factory takes the number of bytes (PosixShmArena.create).

        groups: the layers of each group, none with more than n_layers; none given: one group of all n_layers.
        """
        geometry = KvGeometry(num_blocks, block_size, n_layers, n_kv_heads, head_dim, dtype)
        arena = arena_factory(geometry.num_bytes)
        header = geometry.header()
        arena.buffer()[: len(header)] = header
        return cls(_bytes_of(arena, geometry), geometry, arena, groups)

    @classmethod
    def on_device(
        cls,
        device: torch.device | str,
        num_blocks: int,
        block_size: int,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        groups: Groups = (),
    ) -> "KvPool":
        """A zeroed pool in a device's memory, of this process alone. groups: see create."""
        geometry = KvGeometry(num_blocks, block_size, n_layers, n_kv_heads, head_dim, dtype)
        data = torch.zeros(geometry.num_bytes - HEADER_BYTES, dtype=torch.uint8, device=device)
        return cls(data, geometry, None, groups)

    @classmethod
    def attach(cls, arena: Arena, geometry: KvGeometry, groups: Groups = ()) -> "KvPool":
        """The pool that another process created in arena; ValueError if it is of another geometry."""
        header = geometry.header()
        if arena.num_bytes != geometry.num_bytes or bytes(arena.buffer()[: len(header)]) != header:
            raise ValueError(f"the arena does not hold a KV pool of {geometry}")
        return cls(_bytes_of(arena, geometry), geometry, arena, groups)

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.geometry.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.geometry.block_size

    @property
    def dtype(self) -> torch.dtype:
        """Of K and V; uint8 for q8."""
        return self.geometry.dtype

    @property
    def num_bytes(self) -> int:
        """Of the arena, its header included."""
        return self.geometry.num_bytes

    @staticmethod
    def bytes_per_block(block_size: int, n_layers: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes in all its layers together."""
        return KvGeometry(1, block_size, n_layers, n_kv_heads, head_dim, dtype).bytes_per_block

    def copy_block(self, src: int, dst: int) -> None:
        """Copies K and V of a block in all its layers."""
        self._data[:, :, dst].copy_(self._data[:, :, src])

    def close(self) -> None:
        """Drops the views and lets go of the arena; memory that somebody still views goes with the last view."""
        self.k, self.v = [], []
        self._data = torch.empty(0, dtype=self.dtype)
        if self._arena is not None:
            self._arena.close()
            self._arena = None


def _bytes_of(arena: Arena, geometry: KvGeometry) -> Tensor:
    count = geometry.num_bytes - HEADER_BYTES
    return torch.frombuffer(arena.buffer(), dtype=torch.uint8, count=count, offset=HEADER_BYTES)


def _scales(geometry: KvGeometry, n_layers: int, device: torch.device) -> list[Tensor] | None:
    if geometry.dtype != torch.float8_e4m3fn:
        return None
    return [torch.ones(geometry.n_kv_heads, device=device) for _ in range(n_layers)]
