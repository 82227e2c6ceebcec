"""Quantising and dequantising whole matrices, by the native kernels where they are built and else in torch."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.dispatch import native_dequantize, native_quantize
from kernels.reference.encode import encode
from kernels.reference.quant import dequantize as decode
from serve_app.quant.quant_type import WRITABLE, QuantType, encodable

__all__ = ["ENCODERS", "dequantize", "encodable", "pieces", "quantize", "requantize"]

ENCODERS = WRITABLE
"""The types that weights can be quantised to."""

WEIGHTED = tuple(t for t in ENCODERS if t.startswith(("Q4_", "Q5_", "Q2_", "Q3_", "Q6_")))
"""Those that an importance matrix changes: the others only round."""


def quantize(
    x: Tensor | NDArray[np.float32],
    quant_type: QuantType | str | int,
    importance: Tensor | NDArray[np.float32] | None = None,
) -> Tensor | NDArray[np.uint8]:
    """x float32 [rows, columns] → uint8 [rows, bytes per row]; an array for an array, a tensor for a tensor.

    importance float32 [columns], not negative: how much the errors of a column count (an importance matrix's row);
    HQQ, 8-bit and float types have no use for it. Raises ValueError for an unknown type or one only read, columns
    that are no whole number of blocks, a value that is not finite, or one too large for the type's float16 scales.
    """
    wanted = encodable(quant_type)
    values = torch.as_tensor(x)
    if values.ndim != 2:
        raise ValueError(f"a matrix is needed, not {values.ndim} dimensions")
    values = values.to("cpu", torch.float32).contiguous()
    counts = None if importance is None else torch.as_tensor(importance).to("cpu", torch.float32).contiguous()
    blocks = requantize("F32", values.view(torch.uint8).view(len(values), 4 * values.shape[1]), wanted, counts)
    return blocks.numpy() if isinstance(x, np.ndarray) else blocks


def requantize(
    source_type: str, source: Tensor, quant_type: QuantType, importance: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Packed rows uint8 [rows, bytes per row] of any decodable type → those of quant_type, written into out if given.

    Natively nothing is ever expanded but a piece for each thread. ValueError as in quantize.
    """
    native = native_quantize(quant_type)
    if native is not None:
        return native(source_type, source, importance, out)
    done = encode(quant_type, decode(source_type, source), importance)
    if out is None:
        return done
    out.copy_(done)
    return out


def dequantize(blocks: Tensor | NDArray[np.uint8], quant_type: QuantType | str | int) -> Tensor | NDArray[np.float32]:
    """uint8 [rows, bytes per row] → float32 [rows, columns]; an array for an array, a tensor for a tensor.

    ValueError for an unknown type or bytes that are no whole number of blocks.
    """
    wanted = QuantType.parse(quant_type)
    packed = torch.as_tensor(blocks).to("cpu").contiguous()
    wanted.form.row_length(packed.shape[1])
    native = native_dequantize(wanted.form.type_id)
    values = decode(wanted.form, packed) if native is None else native(packed)
    return values.numpy() if isinstance(blocks, np.ndarray) else values


def pieces(num_rows: int, row_bytes: int, piece_bytes: int, multiple: int = 1) -> Iterator[slice]:
    """Ranges of rows of about piece_bytes each: `multiple` times a number of rows, but for the last range."""
    step = max(1, piece_bytes // max(1, multiple * row_bytes)) * multiple
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))
