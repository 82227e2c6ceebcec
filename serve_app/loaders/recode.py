"""Stored tensors in the type that they are to have, piece by piece: what is in memory is never more than a piece."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.dispatch import triton_quantize
from kernels.reference.quant import dequantize as decode
from serve_app.errors import ModelFileError
from serve_app.loaders.checkpoint import Recoding, StoredTensor, num_elements
from serve_app.loaders.pages import as_tensor, drop_pages, expect_pages
from serve_app.quant.encode import pieces, requantize
from serve_app.quant.quant_type import QuantType

PIECE_BYTES = 16 << 20
"""How much of a file is resident at most while it is packed or recoded: enough for all threads, little beside the
model."""

PIECE_WEIGHTS = 8 << 20
"""And how many weights of it, which are four bytes each on a device that encodes them."""

TILE_ROWS = 16
"""Pieces begin at multiples of this many rows, as the native layout packs them."""

Progress = Callable[[str, int], None]
"""Called with a tensor's name and how many bytes of the source are done since the last call."""

# The solver stops when the mean error of the whole matrix stops falling.
_WHOLE = (QuantType.HQQ4, QuantType.HQQ8)


def blocks_of(
    stored: StoredTensor, progress: Progress | None = None, device: torch.device | None = None
) -> Iterator[tuple[int, Tensor]]:
    """A tensor's rows in its form and final order: the first row's number, and uint8 [n, bytes per row].

    device: where they are wanted. What Triton's kernels can encode there comes on it, the same bytes, everything else
    on the CPU. A piece is valid until the next one is taken; it may be the file's own memory. The file's pages are
    given back. Experts (three dimensions) come as rows one below the other, no piece has rows of two. ModelFileError
    naming the tensor whose values cannot be encoded.
    """
    expect_pages(stored.data)
    try:
        for first, blocks, source_bytes in _pieces(stored, device):
            yield first, blocks
            if progress is not None:
                progress(stored.name, source_bytes)
    except ValueError as error:
        raise ModelFileError(f"{stored.file}: tensor {stored.name!r}: {error}") from error
    drop_pages(stored.data)


def recoded_bytes(
    stored: StoredTensor,
    progress: Progress | None = None,
    out: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """All of them together: uint8 [rows, bytes per row], in out or in new memory of the device, else of the CPU."""
    num_rows, columns = _matrix_shape(stored)
    if out is None:
        out = torch.empty((num_rows, stored.form.row_bytes(columns)), dtype=torch.uint8, device=device)
    for first, blocks in blocks_of(stored, progress, device):
        out[first : first + len(blocks)] = blocks
    return out


def _matrix_shape(stored: StoredTensor) -> tuple[int, int]:
    # A bias in another order is a column of rows, a number by itself a row of one.
    is_column = len(stored.shape) == 0 or (len(stored.shape) == 1 and stored.row_order is not None)
    columns = 1 if is_column else stored.shape[-1]
    return num_elements(stored.shape) // max(1, columns), columns


def _pieces(stored: StoredTensor, device: torch.device | None) -> Iterator[tuple[int, Tensor, int]]:
    """First row, blocks, and how many bytes of the source they came from."""
    recoding, order, form = stored.recoding, stored.row_order, stored.form
    num_rows, columns = _matrix_shape(stored)
    rows = as_tensor(stored.data).view(num_rows, -1)
    row_bytes = rows.shape[1]
    is_whole = recoding is not None and form.name in _WHOLE
    on_device = None if recoding is None or device is None else triton_quantize(form.name, device)
    most = PIECE_BYTES if on_device is None else min(PIECE_BYTES, PIECE_WEIGHTS * row_bytes // max(1, columns))
    out = torch.empty(0, dtype=torch.uint8)
    for matrix, weights in _matrices(stored, num_rows, columns):
        size = len(matrix) * row_bytes if is_whole else most
        for piece in pieces(len(matrix), row_bytes, size, 1 if is_whole else TILE_ROWS):
            part = slice(matrix.start + piece.start, matrix.start + piece.stop)
            # A whole matrix is solved in the file's order: sums of its errors would else have other bits.
            source = rows[part] if order is None or is_whole else rows[order[part]]
            if recoding is None:
                yield part.start, source, source.nbytes
            elif on_device is not None:
                values = _values(recoding, source.to(device))
                yield part.start, on_device(values, weights), source.nbytes
            else:
                if len(out) != len(source):
                    out = torch.empty((len(source), form.row_bytes(columns)), dtype=torch.uint8)
                old, values = recoding.source.name, source
                if recoding.shift:
                    old, values = "F32", _values(recoding, source).view(torch.uint8)
                requantize(old, values, QuantType(form.name), weights, out)
                yield part.start, out[order] if is_whole and order is not None else out, source.nbytes
            if order is None:
                drop_pages(stored.data[part.start * row_bytes : part.stop * row_bytes])


def _values(recoding: Recoding, source: Tensor) -> Tensor:
    """float32 [rows, columns], where the source's bytes are."""
    values = decode(recoding.source, source)
    return values + recoding.shift if recoding.shift else values


def _matrices(stored: StoredTensor, num_rows: int, columns: int) -> Iterator[tuple[range, Tensor | None]]:
    """Ranges of rows that are one matrix, with the importance of its columns: one, or one for each expert."""
    experts = stored.shape[0] if len(stored.shape) == 3 else 1
    each = num_rows // max(1, experts)
    for e in range(experts):
        recoding = None if stored.recoding is None else stored.recoding.of_expert(e, columns)
        yield range(e * each, (e + 1) * each), None if recoding is None else recoding.importance
