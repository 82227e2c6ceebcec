"""Writes SafeTensors files tensor by tensor.

Packed matrices are U8 tensors [rows, bytes per row]; the file's metadata says under QUANTISED which type each has.
"""

import json
from collections.abc import Sequence
from typing import Any, BinaryIO

from serve_app.loaders.checkpoint import num_bytes
from serve_app.loaders.quantized import Step
from serve_app.loaders.safetensors import QUANTISED

_PLAIN = ("F32", "F16", "BF16")


class SafetensorsSink:
    """A file that tensors are written to one after the other, behind the header that names them."""

    def __init__(self, file: BinaryIO, steps: Sequence[Step]) -> None:
        self._file = file
        file.write(_header(steps))

    def begin(self) -> None:
        """Tensors follow each other without a gap."""

    def write(self, data: Any) -> None:
        """See Sink."""
        self._file.write(data)


def _header(steps: Sequence[Step]) -> bytes:
    entries: dict[str, Any] = {}
    types: dict[str, str] = {}
    at = 0
    for step in steps:
        shape = list(step.source.shape)
        dtype, size = step.form.name, num_bytes(step.form, shape)
        if dtype not in _PLAIN:
            types[step.name] = dtype
            shape[-1] = step.form.row_bytes(shape[-1])
            dtype = "U8"
        entries[step.name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    entries = {"__metadata__": {"format": "pt", QUANTISED: json.dumps(types)}, **entries}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
