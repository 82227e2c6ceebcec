"""Importance matrices: for each tensor the mean square of what is multiplied by each of its columns.

Two forms, as llama-imatrix writes them: the older .dat (little-endian: count of entries, then for each the length of
its name, the name, the number of evaluations, the number of values, the sums of squares as float32; behind them the
number of chunks and the name of the text), and GGUF (tensors NAME.in_sum2 and NAME.counts).
"""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import ModelFileError
from serve_app.gguf_file import open_gguf

Importance = Mapping[str, NDArray[np.float32]]
"""GGUF tensor name → float32 [columns], or [experts * columns]."""

_MOST_NAME_BYTES = 1 << 10
_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path) -> Importance:
    """Reads either form; ModelFileError, one sentence, for a file that is none."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from error
    return _read_gguf(path) if is_gguf else _read_dat(path, path.read_bytes())


def write_imatrix(path: Path, importance: Importance, evaluations: int = 1) -> None:
    """Writes the .dat form. evaluations: how many chunks the means are of, at least 1."""
    parts = [struct.pack("<i", len(importance))]
    for name, values in importance.items():
        raw = name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", evaluations, values.size)]
        parts += [(values.astype("<f4") * np.float32(evaluations)).tobytes()]
    path.write_bytes(b"".join(parts))


def _read_dat(path: Path, data: bytes) -> Importance:
    at = 0

    def count(what: str, most: int) -> int:
        nonlocal at
        if at + 4 > len(data):
            raise ModelFileError(f"{path}: is no importance matrix, or truncated ({what} at byte {at})")
        value: int = struct.unpack_from("<i", data, at)[0]
        at += 4
        if not 0 <= value <= most:
            raise ModelFileError(f"{path}: is no importance matrix ({what} is {value} at byte {at - 4})")
        return value

    found: dict[str, NDArray[np.float32]] = {}
    entries = count("the number of entries", len(data) // 12)
    if not entries:
        raise ModelFileError(f"{path}: is an importance matrix without entries")
    for _ in range(entries):
        length = count("the length of a name", min(_MOST_NAME_BYTES, len(data) - at - 4))
        name = data[at : at + length].decode("utf-8", "replace")
        at += length
        evaluations = count("the number of evaluations", 2**31 - 1)
        size = count("the number of values", max(0, (len(data) - at - 4) // 4))
        if not size:
            raise ModelFileError(f"{path}: the importance of {name!r} has no values")
        values = np.frombuffer(data, "<f4", size, at).astype(np.float32)
        at += 4 * size
        found[name] = _checked(path, name, values / np.float32(max(1, evaluations)))
    return found


def _read_gguf(path: Path) -> Importance:
    found: dict[str, NDArray[np.float32]] = {}
    with open_gguf(path, with_texts=False) as file:
        for stored in sorted(file.tensors):
            if not stored.endswith(_SUMS):
                continue
            name = stored.removesuffix(_SUMS)
            counts_name = name + _COUNTS
            if counts_name not in file.tensors:
                raise ModelFileError(f"{path}: tensor {counts_name!r} is missing")
            infos = file.tensors[stored], file.tensors[counts_name]
            if any(info.type_id != 0 for info in infos):
                raise ModelFileError(f"{path}: the sums and counts of {name!r} are no float32")
            sums, counts = (file.data(info.name).copy().view("<f4") for info in infos)
            if sums.size == 0 or counts.size == 0 or sums.size % counts.size:
                raise ModelFileError(f"{path}: {sums.size} sums of {name!r} do not fit {counts.size} counts")
            if not (np.isfinite(counts).all() and (counts >= 0).all()):
                raise ModelFileError(f"{path}: the counts of {name!r} are negative or not finite")
            per_expert = sums.reshape(counts.size, -1)
            # An expert that no token reached says nothing: all its columns count alike.
            means = np.where(counts[:, None] > 0, per_expert / np.maximum(counts[:, None], 1), 1)
            found[name] = _checked(path, name, means.astype(np.float32).reshape(-1))
    if not found:
        raise ModelFileError(f"{path}: holds no importance matrix (no tensor is named …{_SUMS})")
    return found


def _checked(path: Path, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ModelFileError(f"{path}: the importance of {name!r} has values that are negative or not finite")
    return values.astype(np.float32)
