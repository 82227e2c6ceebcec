"""Matrices kept as packed blocks and multiplied in plain torch, usually the mapped bytes of a GGUF file."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kernels.formats import BlockFormat
from kernels.reference.quant import dequantize
from serve_app.quant.weight import FUSED_COPY_BYTES, DenseWeight, FusedWeight, Weight

TILE_ELEMENTS = 1 << 18
"""Weights decoded at a time: small enough for a core's cache, large enough that the calls do not count."""


class PackedWeight:
    """Rows of packed blocks, decoded piece by piece while they are multiplied and never kept expanded.

    blocks [out, bytes per row] uint8, contiguous, on any device, owned by the file mapping; dtype: of activations.
    One tile of rows is decoded at a time. keep_decoded keeps an expanded copy beside the blocks, for models so small
    that decoding them would take most of a step. On the CPU a NativeWeight takes its place where there are native
    kernels.
    """

    def __init__(self, form: BlockFormat, blocks: Tensor, dtype: torch.dtype, *, keep_decoded: bool = False) -> None:
        self.form = form
        self.blocks = blocks
        self._dtype = dtype
        self._in_features = form.row_length(blocks.shape[1])
        self._tile_rows = max(1, TILE_ELEMENTS // max(1, self._in_features))
        self._decoded = self._decode(blocks) if keep_decoded else None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.blocks.shape[0], self._in_features

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, not of the blocks."""
        return self._dtype

    @property
    def keeps_decoded(self) -> bool:
        """Whether an expanded copy is kept."""
        return self._decoded is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks and of the expanded copy."""
        return self.blocks.nbytes + (0 if self._decoded is None else self._decoded.nbytes)

    def matmul(self, x: Tensor) -> Tensor:
        """See Weight. Scratch: one tile."""
        if self._decoded is not None:
            return functional.linear(x, self._decoded)
        tiles = torch.split(self.blocks, self._tile_rows)
        return torch.cat([functional.linear(x, self._decode(tile)) for tile in tiles], dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        """See Weight."""
        if self._decoded is not None:
            return functional.embedding(ids, self._decoded)
        return self._decode(self.blocks[ids])

    def dequantize(self) -> Tensor:
        """See Weight."""
        return self._decode(self.blocks) if self._decoded is None else self._decoded

    def _decode(self, blocks: Tensor) -> Tensor:
        return dequantize(self.form, blocks).to(self._dtype)


def fuse(parts: Sequence[Weight]) -> Weight:
    """One weight whose outputs are those of the parts, in order; a single matrix where that costs little memory."""
    if len(parts) == 1:
        return parts[0]
    if sum(p.nbytes for p in parts) <= FUSED_COPY_BYTES:
        dense = [p for p in parts if isinstance(p, DenseWeight)]
        if len(dense) == len(parts) and len({p.dtype for p in dense}) == 1:
            return DenseWeight(torch.cat([p.dequantize() for p in dense]))
        packed = [p for p in parts if isinstance(p, PackedWeight)]
        if len(packed) == len(parts) and len({(p.form.name, p.keeps_decoded) for p in packed}) == 1:
            first = packed[0]
            blocks = torch.cat([p.blocks for p in packed])
            return PackedWeight(first.form, blocks, first.dtype, keep_decoded=first.keeps_decoded)
    return FusedWeight(parts)
