"""Experts in the layout of the native CPU kernels."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serve_app.quant.native_weight import NativeWeight
from serve_app.quant.weight import Weight

if TYPE_CHECKING:
    from kernels.cpu.packed import PackedMatrix

TILE_ROWS = 16
"""Rows of a tile of the layout. Each expert begins with a tile of its own."""


class NativeExperts:
    """See Experts: one matrix in which the experts lie one below the other, each filled up to whole tiles."""

    def __init__(
        self,
        matrix: "PackedMatrix",
        num_experts: int,
        rows: int,
        dtype: torch.dtype = torch.float32,
        *,
        is_exact: bool = False,
    ) -> None:
        """rows: of one expert. dtype, is_exact: see NativeWeight."""
        self.matrix = matrix
        self._num_experts = num_experts
        self._rows = rows
        self._dtype = dtype
        self._is_exact = is_exact

    @staticmethod
    def empty(type_id: int, num_experts: int, rows: int, columns: int) -> "NativeExperts":
        """Zeros. ValueError for a type that the kernels cannot keep."""
        from kernels.cpu.packed import PackedMatrix

        return NativeExperts(PackedMatrix(type_id, num_experts * padded(rows), columns), num_experts, rows)

    @property
    def num_experts(self) -> int:
        """See Experts."""
        return self._num_experts

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._rows, self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, not of the blocks."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrix."""
        return self.matrix.nbytes

    def expert(self, number: int) -> Weight:
        """See Experts."""
        return NativeWeight(self._part(number), self._dtype, is_exact=self._is_exact)

    def pack(self, number: int, first: int, blocks: Tensor) -> None:
        """Puts rows in file order, uint8 [n, bytes per row], at an expert's rows first, first + 1, …"""
        self._part(number).pack(first, blocks)

    def _part(self, number: int) -> "PackedMatrix":
        return self.matrix.part(number * padded(self._rows), self._rows)


def padded(rows: int) -> int:
    """The rows of an expert and those that fill its last tile."""
    return -(-rows // TILE_ROWS) * TILE_ROWS
