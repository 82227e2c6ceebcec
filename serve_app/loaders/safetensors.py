"""SafeTensors files, single or sharded with an index, as mapped tensors by the checkpoint's own names.

Source: the safetensors format description (8 bytes of header length, JSON header, data).
"""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from kernels.formats import BY_NAME, BlockFormat
from serve_app.errors import ModelFileError
from serve_app.loaders.checkpoint import StoredTensor, num_elements
from serve_app.loaders.pages import map_file

QUANTISED = "sirocco.quantised"
"""Key of a file's metadata: a JSON object from the names of U8 tensors to the types of the blocks that they are."""

_MAX_HEADER_BYTES = 100 << 20
_MAX_DIMS = 8
_DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


class SafetensorsCheckpoint:
    """The tensors of one or several files. Raises ModelFileError for a bad file or a name that occurs twice."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._label = str(paths[0])
        self._tensors: dict[str, StoredTensor] = {}
        self._of_other_types: dict[str, str] = {}
        for path in paths:
            self._read(path)

    @property
    def label(self) -> str:
        """See Checkpoint."""
        return self._label

    def find(self, name: str) -> StoredTensor | None:
        """See Checkpoint."""
        if name in self._of_other_types:
            raise ModelFileError(self._of_other_types[name])
        return self._tensors.get(name)

    def stored_name(self, name: str) -> str:
        """The name itself."""
        return name

    def stored(self) -> Iterator[StoredTensor]:
        """See Checkpoint."""
        for name in sorted(self._tensors):
            yield self._tensors[name]

    def require_readable_weights(self) -> None:
        """ModelFileError for the first weight of a type that is none: who goes through stored() does not see it."""
        for name, sentence in self._of_other_types.items():
            if name.endswith("weight"):  # GPTQ's are called qweight
                raise ModelFileError(sentence)

    def _read(self, path: Path) -> None:
        data = map_file(path)
        header, begin = _read_header(path, data)
        packed = _packed_types(path, header.pop("__metadata__", None))
        spans = []
        for name, entry in header.items():
            if name in self._tensors or name in self._of_other_types:
                raise ModelFileError(f"{path}: tensor {_short(name)} is in more than one file")
            dtype, shape, first, last = _check_entry(path, name, entry, len(data) - begin)
            spans.append((first, last, name))
            if dtype == "U8" and name in packed:
                form = packed[name]
                self._tensors[name] = _packed_tensor(path, name, form, shape, data[begin + first : begin + last])
            elif dtype in _DTYPES:
                form = BY_NAME[_DTYPES[dtype]]
                self._tensors[name] = StoredTensor(str(path), name, form, shape, data[begin + first : begin + last])
            else:
                self._of_other_types[name] = (
                    f"{path}: tensor {_short(name)} has type {dtype}; supported are {', '.join(_DTYPES)}"
                )
        _check_overlap(path, spans)


def _read_header(path: Path, data: NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the tensors' bytes begin."""
    if len(data) < 8:
        raise ModelFileError(f"{path}: the file is truncated, {len(data)} bytes are less than a header")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise ModelFileError(
            f"{path}: the header's length {length} does not fit the file of {len(data)} bytes;"
            " it is truncated or no SafeTensors file"
        )
    try:
        header = json.loads(data[8 : 8 + length].tobytes().decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: the header is no valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: the header is no JSON object")
    return header, 8 + length


def _packed_types(path: Path, metadata: Any) -> dict[str, BlockFormat]:
    """The types of quantised tensors, which metadata names under QUANTISED."""
    text = metadata.get(QUANTISED) if isinstance(metadata, dict) else None
    if text is None:
        return {}
    try:
        types = json.loads(text)
        return {str(name): BY_NAME[kind] for name, kind in types.items()}
    except (TypeError, ValueError, RecursionError, AttributeError, KeyError) as error:
        raise ModelFileError(f"{path}: metadata {QUANTISED!r} names no types of tensors ({error!r})") from error


def _packed_tensor(
    path: Path, name: str, form: BlockFormat, shape: tuple[int, ...], data: NDArray[np.uint8]
) -> StoredTensor:
    """A U8 tensor [..., bytes per row] as the weights that it holds."""
    try:
        columns = form.row_length(shape[-1]) if shape else 0
    except ValueError as error:
        raise ModelFileError(f"{path}: tensor {_short(name)}: {error}") from error
    return StoredTensor(str(path), name, form, (*shape[:-1], columns), data)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"the key {_short(name)} occurs twice")
        unique[name] = value
    return unique


def _check_entry(path: Path, name: str, entry: Any, data_bytes: int) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of a tensor, each checked against the others and the file."""
    where = f"{path}: tensor {_short(name)}"
    if not isinstance(entry, dict):
        raise ModelFileError(f"{where} is described by no JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or (dtype not in _DTYPES and dtype not in _SIZES):
        raise ModelFileError(f"{where} has the unknown type {dtype!r}")
    if not (_are_counts(shape) and len(shape) <= _MAX_DIMS):
        raise ModelFileError(f"{where} has the impossible shape {_short(shape)}")
    if not (_are_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1] <= data_bytes):
        raise ModelFileError(
            f"{where} lies at bytes {_short(offsets)}, outside the file's {data_bytes} bytes of data; it is truncated"
        )
    size = BY_NAME[_DTYPES[dtype]].block_bytes if dtype in _DTYPES else _SIZES[dtype]
    if num_elements(shape) * size != offsets[1] - offsets[0]:
        raise ModelFileError(
            f"{where} of type {dtype} and shape {_short(shape)} does not fit its {offsets[1] - offsets[0]} bytes"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_overlap(path: Path, spans: list[tuple[int, int, str]]) -> None:
    spans = sorted(s for s in spans if s[0] < s[1])
    for (_, end, name), (begin, _, following) in pairwise(spans):
        if begin < end:
            raise ModelFileError(f"{path}: tensors {_short(name)} and {_short(following)} overlap")
