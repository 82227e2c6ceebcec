"""Records a step's operations over symbolic buffers and makes the native program of them (csrc/program.h).

What the recording adds by itself: a product's input in the form that its matrices read, written by the operation that
made the rows wherever that can do it; and after the last attention only the rows whose logits are wanted are computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu import _native

MAX_FORMS = 2
"""Forms of activations that one operation can write (csrc/layer_jobs.h)."""


@dataclass(slots=True, eq=False)
class Buffer:
    """A row of `width` numbers for each token: float32, or with a kind in that form of activations (csrc/act.h).

    maker: the operation that wrote the present contents, if that can write further forms of them. forms: by kind, the
    activations made of the present contents.
    """

    width: int
    kind: int | None = None
    maker: "Operation | None" = None
    forms: "dict[int, Buffer]" = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * 4 if self.kind is None else _native.act_row_bytes(self.kind, self.width)


BufferNumber = Callable[[Buffer | None], int]
Emit = Callable[[_native.Program, BufferNumber], None]


@dataclass(slots=True, eq=False)
class Operation:
    """One recorded operation. emit adds it to the native program; forms are what it writes besides its result."""

    reads: Sequence[Buffer]
    writes: Sequence[Buffer]
    emit: Emit
    forms: list[Buffer] = field(default_factory=list)
    mixes_rows: bool = False

    def form_pairs(self, number: BufferNumber) -> list[tuple[int, int]]:
        """(kind, number) of each further form."""
        return [(form.kind or 0, number(form)) for form in self.forms]


Covering = Callable[[int], NDArray[np.float32]]
"""A rotary table that may grow: gives at least so many rows, and the same array as long as they are enough."""


class Recording:
    """The list of operations so far, in the order of the calls. Tensors that are handed in stay referred to."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._kept: list[Any] = []
        self._tables: list[Covering] = []
        self._rows_ahead: list[int] = []

    def table(self, covering: Covering, rows_ahead: int = 0) -> int:
        """The number of a rotary table in the native program; it has rows_ahead more rows than positions."""
        if covering not in self._tables:
            self._tables.append(covering)
            self._rows_ahead.append(rows_ahead)
        return self._tables.index(covering)

    def keep(self, tensor: Tensor | None) -> int:
        """The address of a contiguous float32 tensor that the program will read; 0 for None."""
        if tensor is None:
            return 0
        self._kept.append(tensor)
        assert tensor.is_contiguous()
        return tensor.data_ptr()

    def keep_alive(self, thing: object) -> None:
        """Holds what the program refers to."""
        self._kept.append(thing)

    def record(
        self,
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
        emit: Emit,
        *,
        makes: Buffer | None = None,
        mixes_rows: bool = False,
    ) -> Operation:
        """Appends an operation. makes: the result that it can also write in further forms (emit reads `forms`)."""
        operation = Operation(reads, writes, emit, mixes_rows=mixes_rows)
        self._operations.append(operation)
        for buffer in writes:
            buffer.maker = None
            buffer.forms = {}
        if makes is not None:
            makes.maker = operation
        return operation

    def form(self, x: Buffer, kind: int) -> Buffer:
        """x in a form of activations: written by x's maker where it has room for that, else by a conversion."""
        if kind in x.forms:
            return x.forms[kind]
        made = Buffer(x.width, kind)
        if x.maker is None or len(x.maker.forms) == MAX_FORMS:
            maker = self.record([x], [], lambda program, number: None)
            maker.emit = lambda program, number: program.convert(number(x), x.width, maker.form_pairs(number))
            x.maker = maker
        x.maker.forms.append(made)
        x.forms[kind] = made
        return made

    def finish(self, result: Buffer, num_blocks: int, block_size: int) -> "RecordedProgram":
        """The native program, for a KV pool of this size; result holds a row for each wanted token."""
        native = _native.Program(num_blocks, block_size)
        tables = [covering(0) for covering in self._tables]
        for table in tables:
            native.table(table.ctypes.data, len(table))
        _Writer(native, self._operations).write(result)
        return RecordedProgram(native, self._tables, self._rows_ahead, tables, self._kept)


class _Writer:
    """Hands the operations to the native program, and narrows those after the last attention to the wanted rows."""

    def __init__(self, native: _native.Program, operations: list[Operation]) -> None:
        self._native = native
        self._operations = operations
        self._numbers: dict[tuple[Buffer, bool], int] = {}
        self._read = {buffer for operation in operations for buffer in operation.reads}
        self._read |= {buffer for operation in operations for buffer in operation.forms}

    def write(self, result: Buffer) -> None:
        mixing = [i for i, operation in enumerate(self._operations) if operation.mixes_rows]
        cut = mixing[-1] + 1 if mixing else 0
        self._read.add(result)
        for operation in self._operations[:cut]:
            operation.emit(self._native, lambda buffer: self._number(buffer, is_wanted=False))
        self._gather(cut)
        for operation in self._operations[cut:]:
            operation.emit(self._native, lambda buffer: self._number(buffer, is_wanted=True))
        self._native.finish(self._number(result, is_wanted=True))

    def _gather(self, cut: int) -> None:
        """Carries what was written before the cut and is needed after it over to the wanted rows."""
        early = self._operations[:cut]
        written = {b for operation in early for b in (*operation.writes, *operation.forms)}
        needed: dict[Buffer, None] = {}
        for operation in self._operations[cut:]:
            for buffer in operation.reads:
                if buffer in written:
                    needed[buffer] = None
            # What is written without having been read holds nothing from before.
            written.difference_update(operation.writes)
        pairs = [(self._number(b, is_wanted=False), self._number(b, is_wanted=True)) for b in needed]
        self._native.gather(pairs)

    def _number(self, buffer: Buffer | None, *, is_wanted: bool) -> int:
        if buffer is None or buffer not in self._read:
            return -1
        key = (buffer, is_wanted)
        if key not in self._numbers:
            self._numbers[key] = self._native.buffer(is_wanted, buffer.row_bytes)
        return self._numbers[key]


class RecordedProgram:
    """A step as one native call. Holds all that the call reads besides its arguments and the KV cache."""

    def __init__(
        self,
        native: _native.Program,
        growing: list[Covering],
        rows_ahead: list[int],
        tables: list[NDArray[np.float32]],
        kept: list[Any],
    ) -> None:
        self._native = native
        self._growing = growing
        self._rows_ahead = rows_ahead
        self._tables = tables
        self._num_positions = self._num_covered()
        self._kept = kept

    def _num_covered(self) -> int:
        counts = [len(table) - ahead for table, ahead in zip(self._tables, self._rows_ahead, strict=True)]
        return min(counts, default=0)

    @property
    def num_operations(self) -> int:
        """Native operations of a step."""
        return self._native.num_ops

    @property
    def bytes_per_row(self) -> tuple[int, int]:
        """Memory that a step takes for each of its tokens, and for each token whose logits are wanted."""
        return self._native.bytes_per_row

    def run(
        self,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        wanted: NDArray[np.int64],
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        groups: Sequence[tuple[NDArray[np.int64], NDArray[np.int32]]],
        max_context_len: int,
    ) -> NDArray[np.float32]:
        """Runs a step on all threads, without the GIL: see ForwardBatch for the arrays. groups: of layers, slots and
        block tables.

        Returns the result's rows [len(wanted), width], memory of the program that its next run overwrites. IndexError
        for an id, position, slot or block out of range, before anything is computed.
        """
        if self._tables and max_context_len > self._num_positions:
            self._grow(max_context_len)
        return self._native.run(token_ids, positions, wanted, query_start, context_lens, list(groups))

    def _grow(self, num_positions: int) -> None:
        self._tables = [covering(num_positions) for covering in self._growing]
        for number, table in enumerate(self._tables):
            self._native.set_table(number, table.ctypes.data, len(table))
        self._num_positions = self._num_covered()
