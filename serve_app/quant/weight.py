"""The matrices of linear layers and embeddings, whatever form they are kept in."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import native_matmul, triton_computes
from kernels.formats import BY_NAME

PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of one number a weight."""

_TYPE_NAMES = {dtype: name for name, dtype in PLAIN_DTYPES.items()}

FUSED_COPY_BYTES = 4 << 20
"""Fused parts up to this size are copied into one matrix: one product instead of several, for little memory."""


class Weight(Protocol):
    """A matrix [out, in] that multiplies activations; never written after loading, so threads may share it."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations in and out."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix takes, those of mapped files included."""
        ...

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, in] → x W^T [T, out], both of `dtype`."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """The rows ids [N] int64 → [N, in] of `dtype`: an embedding's gather."""
        ...

    def dequantize(self) -> Tensor:
        """The whole matrix [out, in] of `dtype`; a copy where it is packed."""
        ...


class DenseWeight:
    """A matrix of plain numbers. The tensor may be a view of a mapped file: it is never written.

    On the CPU the native kernel multiplies, where there is one: unlike a library's product, its sums do not depend on
    how many tokens a step has, so a request's logits do not depend on the other requests. Where Triton's kernels
    compute, one of them does for few tokens, which a library's product is not made for.
    """

    def __init__(self, tensor: Tensor) -> None:
        """tensor [out, in], contiguous."""
        self._tensor = tensor
        is_native = tensor.device.type == "cpu" and tensor.dtype in _TYPE_NAMES
        self._native = native_matmul(BY_NAME[_TYPE_NAMES[tensor.dtype]].type_id) if is_native else None
        self._bytes = tensor.view(torch.uint8)
        self._few: Callable[[Tensor, Tensor], Tensor] | None = None
        if self._native is None and tensor.dtype in _TYPE_NAMES and triton_computes(tensor.device)[0]:
            from kernels.gpu import dense_gemv  # needs Triton

            self._few, self._most = dense_gemv.matmul, dense_gemv.MOST_TOKENS

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._tensor.shape[0], self._tensor.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensor."""
        return self._tensor.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self._tensor.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """See Weight. Narrower rows are widened: routers and gates of experts are float32 in every model."""
        if x.dtype.itemsize < self._tensor.dtype.itemsize:
            x = x.to(self._tensor.dtype)
        if self._native is not None:
            return self._native(x.contiguous(), self._bytes)
        if self._few is not None and len(x) <= self._most:
            return self._few(x, self._tensor)
        return functional.linear(x, self._tensor)

    def rows(self, ids: Tensor) -> Tensor:
        """See Weight."""
        return functional.embedding(ids, self._tensor)

    def dequantize(self) -> Tensor:
        """The tensor itself."""
        return self._tensor


class FusedWeight:
    """Matrices over the same input, one below the other, each kept as it is."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self.parts = tuple(parts)

    @property
    def shape(self) -> tuple[int, int]:
        """(sum of outs, in)."""
        return sum(p.shape[0] for p in self.parts), self.parts[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the parts."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(p.nbytes for p in self.parts)

    def matmul(self, x: Tensor) -> Tensor:
        """See Weight."""
        return torch.cat([p.matmul(x) for p in self.parts], dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        """See Weight."""
        out = torch.empty(len(ids), self.shape[1], dtype=self.dtype, device=ids.device)
        start = 0
        for part in self.parts:
            here = (ids >= start) & (ids < start + part.shape[0])
            out[here] = part.rows(ids[here] - start)
            start += part.shape[0]
        return out

    def dequantize(self) -> Tensor:
        """See Weight."""
        return torch.cat([p.dequantize() for p in self.parts])
