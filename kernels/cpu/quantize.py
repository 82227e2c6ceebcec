"""Typed wrappers of the native encoders: rows of any readable type in, blocks out."""

import torch
from torch import Tensor

from kernels.cpu import _native
from kernels.formats import BY_ID, BY_NAME
from kernels.reference.encode import check_sizes, refuse

_HQQ_BITS = {"HQQ4": 4, "HQQ8": 8}


def _require(*holds: bool) -> None:
    assert all(holds), "a tensor handed to a native encoder has the wrong shape, dtype or strides"


def can_quantize(type_name: str) -> bool:
    """Whether there is a native encoder for the type."""
    return type_name in _HQQ_BITS or bool(_native.can_encode(BY_NAME[type_name].type_id))


def quantize_rows(
    type_name: str, source_type: str, source: Tensor, importance: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """source uint8 [rows, bytes per row] of source_type → uint8 [rows, bytes per row] of type_name, on all threads.

    importance float32 [columns]; HQQ, Q8 and float types take none into account. out: where to write. Decoded values
    exist only in pieces that fit a core's cache. Raises ValueError as kernels.reference.encode.encode does.
    """
    form, source_form = BY_NAME[type_name], BY_NAME[source_type]
    rows, columns = len(source), source_form.row_length(source.shape[1])
    check_sizes(form, columns, importance)
    row_bytes = form.row_bytes(columns)
    if out is None:
        out = torch.empty((rows, row_bytes), dtype=torch.uint8)
    for blocks, shape in ((source, source.shape), (out, (rows, row_bytes))):
        _require(blocks.dtype == torch.uint8, blocks.is_contiguous(), blocks.shape == shape)
        _require(blocks.device.type == "cpu")
    if rows == 0 or columns == 0:
        return out
    source_at = (source_form.type_id, source.data_ptr(), source.shape[1])
    if type_name in _HQQ_BITS:
        reason, row = _native.quantize_hqq(_HQQ_BITS[type_name], *source_at, rows, columns, out.data_ptr())
    else:
        weights = None if importance is None else importance.float().contiguous()
        weights_at = 0 if weights is None else weights.data_ptr()
        reason, row = _native.quantize(form.type_id, *source_at, weights_at, rows, columns, out.data_ptr(), row_bytes)
    refuse(BY_ID[form.type_id], reason, row)
    return out
