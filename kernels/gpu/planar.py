"""Matrices in planes: packed from a file's blocks once, unpacked bit for bit. Plain torch, on any device."""

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from kernels.formats import BY_NAME
from kernels.gpu import block_codes
from kernels.gpu.planar_forms import PLANAR, VECTOR_WORDS, PlanarForm

PACK_BYTES = 8 << 20
"""How much of a tensor is packed or unpacked at a time; beside the matrix that takes some ten times as much."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PlanarMatrix:
    """A matrix [rows, columns] of one type. Never written after packing.

    low int32 [rows, columns / fields]; high uint8 or int16, as many; sub uint8 or int16 [rows, columns / run]; block
    [rows, columns / block]: int16 or int32, one or two float16, or int64, two float32. high and sub are None where the
    type has none. All are contiguous, so that every row of `low` begins at a multiple of 16 bytes. What the numbers
    mean: docs/kernels.md.
    """

    def __init__(self, form: PlanarForm, rows: int, columns: int, device: torch.device | str = "cpu") -> None:
        """Zeros. ValueError for columns that are no whole number of blocks."""
        form.row_bytes(columns)
        self.form = form
        self.rows = rows
        self.columns = columns

        def plane(per_row: int, num_bytes: int) -> Tensor | None:
            return torch.zeros(rows, per_row, dtype=_WORDS[num_bytes], device=device) if num_bytes else None

        words = columns // form.fields
        self.low = torch.zeros(rows, words, dtype=torch.int32, device=device)
        self.high = plane(words, form.high_bytes)
        self.sub = plane(columns // form.run, form.sub_bytes)
        self.block = torch.zeros(rows, columns // form.block, dtype=_WORDS[form.block_bytes], device=device)

    @staticmethod
    def of(type_name: str, blocks: Tensor) -> "PlanarMatrix":
        """All rows of uint8 [rows, bytes per row], on the device of the blocks. KeyError for a type without planes."""
        matrix = PlanarMatrix(
            PLANAR[type_name], len(blocks), BY_NAME[type_name].row_length(blocks.shape[1]), blocks.device
        )
        matrix.pack(0, blocks)
        return matrix

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    @property
    def device(self) -> torch.device:
        """Of all planes."""
        return self.low.device

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """Those that there are."""
        return tuple(plane for plane in (self.low, self.high, self.sub, self.block) if plane is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes)

    def pack(self, first: int, blocks: Tensor) -> None:
        """Puts rows in file order, uint8 [n, bytes per row] on any device, at rows first, first + 1, …

        Piece by piece: see PACK_BYTES. IndexError for rows that it does not have.
        """
        self._require_rows(first, len(blocks))
        step = max(1, PACK_BYTES // max(1, blocks.shape[1]))
        for start in range(0, len(blocks), step):
            piece = blocks[start : start + step].to(self.device)
            low, high, sub, block = block_codes.split(self.form, piece)
            self._store(first + start, low, high, sub, block)

    def unpack(self, first: int = 0, count: int | None = None) -> Tensor:
        """Rows in file order again, uint8 [count, bytes per row]: the exact inverse of pack."""
        count = self.rows - first if count is None else count
        self._require_rows(first, count)
        form = BY_NAME[self.form.name]
        blocks = torch.empty(count, form.row_bytes(self.columns), dtype=torch.uint8, device=self.device)
        step = max(1, PACK_BYTES // max(1, blocks.shape[1]))
        for start in range(0, count, step):
            piece = slice(start, min(count, start + step))
            blocks[piece] = block_codes.join(self.form, *self._codes(first + piece.start, piece.stop - piece.start))
        return blocks

    def part(self, first: int, count: int) -> "PlanarMatrix":
        """Rows first … first + count - 1 as a matrix in the same memory. IndexError for rows that it does not have."""
        self._require_rows(first, count)
        part = copy(self)
        part.rows = count
        for name in ("low", "high", "sub", "block"):
            plane = getattr(self, name)
            setattr(part, name, None if plane is None else plane[first : first + count])
        return part

    def _require_rows(self, first: int, count: int) -> None:
        if not 0 <= first <= first + count <= self.rows:
            raise IndexError(f"rows {first} to {first + count} of a matrix of {self.rows}")

    def _store(self, first: int, low: Tensor, high: Tensor | None, sub: Tensor | None, block: Tensor) -> None:
        """low, high: codes uint8 [n, columns]; sub, block: bytes [n, bytes per row]."""
        here = slice(first, first + len(low))
        self.low[here] = _to_words(low, self.form, self.form.low_bit, 4).view(torch.int32)
        self.block[here] = block.contiguous().view(self.block.dtype)
        if self.high is not None:
            assert high is not None
            words = _to_words(high, self.form, self.form.high_bit, self.form.high_bytes)
            self.high[here] = words.view(self.high.dtype)
        if self.sub is not None:
            assert sub is not None
            self.sub[here] = sub.contiguous().view(self.sub.dtype)

    def _codes(self, first: int, count: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """What _store takes."""
        here = slice(first, first + count)
        form = self.form
        low = _from_words(self.low[here].view(torch.uint8), form, form.low_bit, 4, form.low_bits)
        high = sub = None
        if self.high is not None:
            words = self.high[here].view(torch.uint8)
            high = _from_words(words, form, form.high_bit, form.high_bytes, form.high_bits)
        if self.sub is not None:
            sub = self.sub[here].view(torch.uint8)
        return low, high, sub, self.block[here].view(torch.uint8)


def _to_words(codes: Tensor, form: PlanarForm, first_bit: Callable[[int], int], num_bytes: int) -> Tensor:
    """[n, columns] → bytes [n, words * num_bytes]: weight k of a vector is field k // 4 of its word k % 4."""
    n = len(codes)
    pieces = codes.view(n, -1, form.fields, VECTOR_WORDS)
    words = torch.zeros(n, pieces.shape[1], VECTOR_WORDS, num_bytes, dtype=torch.uint8, device=codes.device)
    for i in range(form.fields):
        byte, bit = divmod(first_bit(i), 8)
        words[..., byte] |= pieces[:, :, i] << bit
    return words.view(n, -1)


def _from_words(words: Tensor, form: PlanarForm, first_bit: Callable[[int], int], num_bytes: int, bits: int) -> Tensor:
    """The inverse of _to_words."""
    n = len(words)
    pieces = words.view(n, -1, VECTOR_WORDS, num_bytes)
    codes = torch.empty(n, pieces.shape[1], form.fields, VECTOR_WORDS, dtype=torch.uint8, device=words.device)
    for i in range(form.fields):
        byte, bit = divmod(first_bit(i), 8)
        codes[:, :, i] = (pieces[..., byte] >> bit) & ((1 << bits) - 1)
    return codes.view(n, -1)
