"""The matrices of a mixture's experts: one grouped tensor for all experts of a layer, in whatever form it is kept."""

from typing import Protocol

import torch
from torch import Tensor

from kernels.formats import BlockFormat
from serve_app.quant.packed import PackedWeight
from serve_app.quant.weight import DenseWeight, Weight


class Experts(Protocol):
    """Matrices [experts, out, in] of one type; never written after loading, so threads may share them."""

    @property
    def num_experts(self) -> int:
        """How many matrices there are."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each of them."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations in and out."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that they take together, those of mapped files included."""
        ...

    def expert(self, number: int) -> Weight:
        """One of them, in the same memory."""
        ...


class DenseExperts:
    """Plain numbers. The tensor may be a view of a mapped file: it is never written."""

    def __init__(self, tensor: Tensor) -> None:
        """tensor [experts, out, in]."""
        self.tensor = tensor

    @property
    def num_experts(self) -> int:
        """See Experts."""
        return self.tensor.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.tensor.shape[1], self.tensor.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensor."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.nbytes

    def expert(self, number: int) -> Weight:
        """See Experts."""
        return DenseWeight(self.tensor[number])


class PackedExperts:
    """Packed blocks, decoded while they are multiplied; see PackedWeight."""

    def __init__(self, form: BlockFormat, blocks: Tensor, dtype: torch.dtype) -> None:
        """blocks [experts, out, bytes per row] uint8; dtype: of activations."""
        self.form = form
        self.blocks = blocks
        self._dtype = dtype

    @property
    def num_experts(self) -> int:
        """See Experts."""
        return self.blocks.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.blocks.shape[1], self.form.row_length(self.blocks.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, not of the blocks."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.blocks.nbytes

    def expert(self, number: int) -> Weight:
        """See Experts."""
        return PackedWeight(self.form, self.blocks[number], self._dtype)
