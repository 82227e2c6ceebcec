"""Matrices in planes, multiplied by the Triton kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.gpu.planar import PlanarMatrix
from serve_app.quant.experts import DenseExperts, Experts, PackedExperts
from serve_app.quant.weight import PLAIN_DTYPES, FusedWeight, Weight


class PlanarWeight:
    """See Weight: a matrix of a type that has planes, on the device that multiplies."""

    def __init__(self, matrix: PlanarMatrix, dtype: torch.dtype) -> None:
        """dtype: of activations in and out; sums are formed in float32."""
        # Needs Triton, which not every machine that reads weights has.
        from kernels.gpu import dequantize, quant_matmul

        self.matrix = matrix
        self._dtype = dtype
        self._products = quant_matmul
        self._numbers = dequantize

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, not of the planes."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the planes."""
        return self.matrix.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """See Weight."""
        return self._products.matmul(self.matrix, x.to(self._dtype))

    def matmul_into(self, x: Tensor, out: Tensor) -> None:
        """The same into out [T, out], of `dtype`, whose rows may be part of wider ones."""
        self._products.matmul(self.matrix, x.to(self._dtype), out=out)

    def rows(self, ids: Tensor) -> Tensor:
        """See Weight. An id outside the matrix gives row 0."""
        return self._numbers.gather_rows(self.matrix, ids, self._dtype)

    def dequantize(self) -> Tensor:
        """See Weight."""
        return self._numbers.dequantize(self.matrix, self._dtype)


class FusedPlanarWeight(FusedWeight):
    """Planar matrices of several types over the same input, one below the other: each writes its columns in place."""

    def __init__(self, planar: Sequence[PlanarWeight]) -> None:
        super().__init__(planar)
        self._planar = tuple(planar)

    def matmul(self, x: Tensor) -> Tensor:
        """See Weight."""
        out = torch.empty(len(x), self.shape[0], dtype=self.dtype, device=x.device)
        start = 0
        for part in self._planar:
            part.matmul_into(x, out[:, start : start + part.shape[0]])
            start += part.shape[0]
        return out


class PlanarExperts:
    """See Experts: one below the other, expert e has rows e * out … (e + 1) * out - 1 of the matrix."""

    def __init__(self, matrix: PlanarMatrix, num_experts: int, dtype: torch.dtype) -> None:
        """dtype: see PlanarWeight. ValueError where the rows are no whole number of experts."""
        if matrix.rows % num_experts:
            raise ValueError(f"{matrix.rows} rows are no whole number of {num_experts} experts")
        self.matrix = matrix
        self._num_experts = num_experts
        self._dtype = dtype

    @property
    def num_experts(self) -> int:
        """See Experts."""
        return self._num_experts

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.rows // self._num_experts, self.matrix.columns

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, not of the planes."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the planes."""
        return self.matrix.nbytes

    def expert(self, number: int) -> Weight:
        """See Experts."""
        rows = self.shape[0]
        return PlanarWeight(self.matrix.part(number * rows, rows), self._dtype)


def grouped_matrix(experts: Experts) -> PlanarMatrix | Tensor | None:
    """What grouped products (kernels.gpu.grouped_matmul) multiply by, in the same memory; None for packed types without
    planes."""
    match experts:
        case PlanarExperts():
            return experts.matrix
        case DenseExperts():
            return experts.tensor.flatten(0, 1)
        case PackedExperts() if experts.form.name in PLAIN_DTYPES:
            return experts.blocks.flatten(0, 1).view(PLAIN_DTYPES[experts.form.name])
        case _:
            return None
