"""Matrices in the layout of the native kernels (csrc/packed.h), made of rows in file order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.cpu import _native


def _require(holds: bool) -> None:
    assert holds, "a tensor handed to a packed matrix has the wrong shape, dtype or strides"


class PackedMatrix:
    """A matrix [rows, columns] of one GGML type: as many bytes as its rows have in a file, rounded up to tiles of 16.

    Zero until rows are packed. Never written afterwards, so threads may share it.
    """

    def __init__(self, type_id: int, rows: int, columns: int) -> None:
        """ValueError for a type that the kernels cannot keep, or columns that are no whole number of its blocks."""
        self.native = _native.PackedMatrix(type_id, rows, columns)

    @staticmethod
    def of(type_id: int, blocks: Tensor, columns: int) -> "PackedMatrix":
        """All rows of uint8 [rows, bytes per row]."""
        matrix = PackedMatrix(type_id, blocks.shape[0], columns)
        matrix.pack(0, blocks)
        return matrix

    def part(self, first: int, rows: int) -> "PackedMatrix":
        """Rows [first, first + rows) as a matrix in the same memory; first is a multiple of 16, else ValueError."""
        made = PackedMatrix.__new__(PackedMatrix)
        made.native = self.native.part(first, rows)
        return made

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.native.rows, self.native.columns

    @property
    def type_id(self) -> int:
        """GGML's number of the type."""
        return int(self.native.type_id)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed rows."""
        return int(self.native.num_bytes)

    def pack(self, first: int, blocks: Tensor, row_order: Tensor | None = None) -> None:
        """Puts rows in file order, uint8 [n, bytes per row], at rows first, first + 1, …

        row_order int64 [m]: takes blocks[row_order] instead. first is a multiple of 16, and so is the number of rows
        unless they are the last ones. The GIL is released.
        """
        count = len(blocks) if row_order is None else len(row_order)
        _require(blocks.dtype == torch.uint8 and blocks.is_contiguous())
        _require(blocks.shape[1] == self.native.row_bytes or len(blocks) == 0)
        order = 0
        if row_order is not None:
            _require(row_order.dtype == torch.int64 and row_order.is_contiguous())
            order = row_order.data_ptr()
        self.native.pack(first, count, blocks.data_ptr(), len(blocks), order)

    def unpack(self, first: int = 0, count: int | None = None) -> Tensor:
        """Rows in file order again, uint8 [count, bytes per row]: the exact inverse of pack."""
        count = self.native.rows - first if count is None else count
        out = torch.empty((count, self.native.row_bytes), dtype=torch.uint8)
        self.native.unpack(first, count, out.data_ptr())
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """The rows ids [N] int64 as float32 [N, columns]; IndexError outside of the matrix."""
        ids = ids.contiguous()
        _require(ids.dtype == torch.int64)
        out = torch.empty((len(ids), self.native.columns), dtype=torch.float32)
        self.native.gather(ids.data_ptr(), len(ids), out.data_ptr())
        return out

    def matmul(
        self, x: Tensor, *, exact: bool = False, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """x float32 [T, columns] → x W^T + bias, float32 [T, rows].

        x is rounded to 8 bits a block (bfloat16 for BF16 matrices) unless exact; a row with a value that is not finite
        then gives NaN. bias float32 [rows]. out: where to write, unit stride in the last dimension.
        """
        rows, columns = self.shape
        if out is None:
            out = torch.empty((len(x), rows), dtype=torch.float32)
        _require(x.dtype == torch.float32 and x.is_contiguous() and x.shape[1] == columns)
        _require(out.dtype == torch.float32 and out.shape == (len(x), rows) and out.stride(1) == 1)
        _require(bias is None or (bias.dtype == torch.float32 and bias.is_contiguous() and bias.shape == (rows,)))
        stride = out.stride(0) if len(x) > 1 else rows
        bias_at = 0 if bias is None else bias.data_ptr()
        self.native.matmul(x.data_ptr(), len(x), exact, bias_at, out.data_ptr(), stride)
        return out


def grouped_matmul(
    matrices: Sequence[PackedMatrix], x: Tensor, starts: Tensor, who: Tensor | None = None, *, exact: bool = False
) -> Tensor:
    """Products of groups of rows, each with a matrix of its own, as the experts of a mixture need them.

    x float32 [T, columns]; starts int64 [len(matrices) + 1], from 0 on: group g are the pairs from starts[g] up to
    starts[g + 1], none perhaps. who int64 [P]: the row of x of each pair, else pair p is row p. Returns float32
    [P, rows]: pair p of group g is x[who[p]] matrices[g]^T, with the bits of matrices[g].matmul. The matrices have one
    shape and one form of activations. IndexError for groups that overlap, do not take all rows, or take a row that x
    does not have.
    """
    _require(len(starts) == len(matrices) + 1 and starts.dtype == torch.int64 and starts.is_contiguous())
    _require(x.dtype == torch.float32 and x.is_contiguous())
    _require(all(x.shape[1] == matrix.shape[1] for matrix in matrices))
    _require(who is None or (who.dtype == torch.int64 and who.is_contiguous()))
    who_at, num_pairs = (0, len(x)) if who is None else (who.data_ptr(), len(who))
    rows = matrices[0].shape[0] if matrices else 0
    out = torch.empty((num_pairs, rows), dtype=torch.float32)
    natives = [matrix.native for matrix in matrices]
    _native.grouped_matmul(
        natives, x.data_ptr(), len(x), who_at, num_pairs, starts.data_ptr(), exact, out.data_ptr(), rows
    )
    return out
