"""Writes GGUF v3 piece by piece. Source: ggml's docs/gguf.md."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.formats import BlockFormat
from serve_app.loaders.checkpoint import num_bytes

ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 4, 5, 6, 7, 8, 9, 10


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to be written: shape outermost first."""

    name: str
    form: BlockFormat
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return num_bytes(self.form, self.shape)


def encoded(value: Any) -> bytes:
    """A value with its type: str, bool, int (unsigned of 32 bits), float, and lists of str, float or int (signed)."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value) if value < 1 << 32 else struct.pack("<IQ", _U64, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    assert isinstance(value, list), f"{type(value).__name__} has no form in a GGUF"
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    kind, code = (_F32, "f") if value and isinstance(value[0], float) else (_I32, "i")
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + struct.pack(f"<{len(value)}{code}", *value)


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


class GgufWriter:
    """Writes to PATH.part and renames it at the end: a file that was not finished never bears the name."""

    def __init__(self, path: Path, metadata: Mapping[str, bytes], tensors: Sequence[TensorPlan]) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._file = self._part.open("wb")
        self._plans: Iterator[TensorPlan] = iter(tensors)
        self._left = 0
        header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
        header += [_text(key) + value for key, value in metadata.items()]
        offset = 0
        for plan in tensors:
            dims = plan.shape[::-1]
            header += [_text(plan.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, plan.form.type_id, offset)]
            offset += _aligned(plan.num_bytes)
        self._file.write(b"".join(header))
        self._pad()

    def begin(self) -> None:
        """The next tensor, whose bytes must follow."""
        assert self._left == 0, "a tensor was not written to its end"
        self._left = next(self._plans).num_bytes

    def write(self, data: Any) -> None:
        """A part of the tensor's bytes (anything with a buffer)."""
        self._left -= memoryview(data).nbytes
        assert self._left >= 0, "more bytes than the tensor has"
        self._file.write(data)
        if self._left == 0:
            self._pad()

    def finish(self) -> None:
        """Closes the file and gives it its name."""
        is_complete = self._left == 0 and next(self._plans, None) is None
        assert is_complete, "tensors are missing"
        self._file.close()
        self._part.replace(self._path)

    def abandon(self) -> None:
        """Removes what has been written."""
        self._file.close()
        self._part.unlink(missing_ok=True)

    def _pad(self) -> None:
        at = self._file.tell()
        self._file.write(bytes(_aligned(at) - at))


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
