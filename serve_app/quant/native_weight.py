"""Matrices in the layout of the native CPU kernels."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.dispatch import native_dequantize
from kernels.formats import BY_ID, BlockFormat
from kernels.reference.quant import dequantize

if TYPE_CHECKING:
    from kernels.cpu.packed import PackedMatrix


class NativeWeight:
    """See Weight: a matrix of any type that the native kernels keep, in memory of its own.

    matrix: what native programs multiply by. Called from Python, matmul does what they do: products take their input
    rounded as the type wants it (kernels.cpu.packed), or as it is where is_exact.
    """

    def __init__(self, matrix: "PackedMatrix", dtype: torch.dtype = torch.float32, *, is_exact: bool = False) -> None:
        """dtype: of activations in and out; sums are formed in float32."""
        self.matrix = matrix
        self._dtype = dtype
        self._is_exact = is_exact

    @property
    def form(self) -> BlockFormat:
        """The type of the blocks."""
        return BY_ID[self.matrix.type_id]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, not of the blocks."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrix."""
        return self.matrix.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """See Weight."""
        return self.matrix.matmul(x.float().contiguous(), exact=self._is_exact).to(self._dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """See Weight."""
        return self.matrix.rows(ids).to(self._dtype)

    def dequantize(self) -> Tensor:
        """See Weight."""
        blocks = self.matrix.unpack()
        native = native_dequantize(self.matrix.type_id)
        return (dequantize(self.form, blocks) if native is None else native(blocks)).to(self._dtype)
