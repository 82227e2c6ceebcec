"""Reads GGUF v2 and v3, single or split, without trusting a byte of it. numpy and mmap only.

Every count in the file is compared with the bytes that are left before anything of that size is made, so that what a
file costs to read is bounded by its length. Source: ggml's docs/gguf.md.
"""

import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kernels.formats import GGML_BY_ID
from serve_app.errors import ModelFileError
from serve_app.gguf_strings import read_strings, skip_strings

MAGIC: Final = b"GGUF"
OLD_MAGICS: Final = (b"lmgg", b"fmgg", b"tjgg")
"""First bytes of the containers before GGUF, which ggml_file reads: ggml, ggmf and ggjt as little-endian numbers."""
_VERSIONS: Final = (2, 3)
_MAX_DIMS: Final = 4
_MAX_NAME_BYTES: Final = 65535
_DEFAULT_ALIGNMENT: Final = 32
# The fewest bytes that one entry can take: key length + type + one byte; name length + dims + type + offset.
_MIN_KEY_BYTES: Final = 13
_MIN_TENSOR_BYTES: Final = 24

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: Final[dict[int, Struct]] = {
    i: Struct(f"<{code}")
    for i, code in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}.items()
}
_ARRAY_DTYPES: Final = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_SHARD_NAME: Final = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GgufTensorInfo:
    """Where a tensor's bytes are. shape: outermost first, as torch has it; offset: bytes from its shard's start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    n_bytes: int
    shard: int
    offset: int


class GgufFile:
    """An open GGUF: metadata of the first shard, tensors of all. Use as a context manager, or close().

    metadata: key → str, int, float, bool, list[str], or a 1-D numpy array for arrays of numbers.
    """

    def __init__(self, shards: Sequence["Shard"]) -> None:
        self.paths: tuple[Path, ...] = tuple(s.path for s in shards)
        self.version: int = shards[0].version
        self.metadata: dict[str, Any] = shards[0].metadata
        self.tensors: dict[str, GgufTensorInfo] = {}
        self._maps: list[mmap.mmap | None] = [s.map for s in shards]
        self._spans = shards[0].spans
        for shard in shards:
            for name, info in shard.tensors.items():
                if name in self.tensors:
                    raise ModelFileError(f"{shard.path}: tensor {shown(name)} is in another shard too")
                self.tensors[name] = info

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, memory-mapped and read-only: uint8 [n_bytes]. KeyError for an unknown name."""
        info = self.tensors[name]
        mapped = self._maps[info.shard]
        assert mapped is not None, "the file is closed"
        return np.frombuffer(mapped, np.uint8, info.n_bytes, info.offset)

    def raw_metadata(self) -> dict[str, bytes]:
        """key → the bytes of its value, its type before them, as a writer needs them: of all keys, texts too."""
        mapped = self._maps[0]
        assert mapped is not None, "the file is closed"
        return {key: mapped[begin:end] for key, (begin, end) in self._spans.items()}

    def close(self) -> None:
        """Unmaps the file; where arrays from data() are still alive, the last of them does it."""
        for mapped in self._maps:
            close_map(mapped)
        self._maps = [None] * len(self._maps)

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, with_texts: bool = True) -> GgufFile:
    """Opens one file or all shards of a split one. Without texts, arrays of strings (vocabularies) are left out of
    the metadata, which saves most of the time.

    A single path that is one shard of several (NAME-00002-of-00003.gguf) brings the others in from its folder; a list
    must hold all of them, in any order. Raises ModelFileError: one sentence with the file and the key or tensor.
    """
    if isinstance(path, str | os.PathLike):
        paths = [Path(path)]
    else:
        paths = [Path(p) for p in path]
    assert paths, "no path given"
    shards: list[Shard] = []
    try:
        for p in paths:
            shards.append(_read_shard(p, with_texts))
        if len(paths) == 1 and shards[0].split_count > 1:
            for p in _siblings(paths[0], shards[0].split_count):
                shards.append(_read_shard(p, with_texts))
        return GgufFile(_in_order(shards))
    except BaseException:
        for shard in shards:
            close_map(shard.map)
        raise


@dataclass(slots=True)
class Shard:
    """One file, mapped and its header read."""

    path: Path
    map: mmap.mmap
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensorInfo]
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    def split_value(self, key: str, default: int) -> int:
        value = self.metadata.get(f"split.{key}", default)
        if type(value) is not int or value < 0:
            raise ModelFileError(f"{self.path}: split.{key} is no count")
        return value

    @property
    def split_count(self) -> int:
        return self.split_value("count", 1)


def _siblings(path: Path, count: int) -> Iterator[Path]:
    """The other shards of the file, by the naming rule of gguf-split."""
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise ModelFileError(
            f"{path}: is one of {count} shards, but its name does not end in -NNNNN-of-{count:05}.gguf"
        )
    for no in range(1, count + 1):
        if no != int(match["no"]):
            yield path.with_name(f"{match['stem']}-{no:05}-of-{count:05}.gguf")


def _in_order(shards: list[Shard]) -> list[Shard]:
    """Shards sorted by their number, complete and of one model; the tensors' shard index is set to the position."""
    count = len(shards)
    for shard in shards:
        if max(1, shard.split_count) != count:
            raise ModelFileError(
                f"{shard.path}: is one of {max(1, shard.split_count)} files (split.count), not {count}"
            )
    if count > 1:
        shards = sorted(shards, key=lambda s: s.split_value("no", 0))
        for no, shard in enumerate(shards):
            if shard.split_value("no", 0) != no:
                raise ModelFileError(
                    f"{shard.path}: split.no is {shard.split_value('no', 0)} where shard {no} is needed"
                )
            shard.tensors = {
                n: GgufTensorInfo(n, t.shape, t.type_id, t.n_bytes, no, t.offset) for n, t in shard.tensors.items()
            }
        num_tensors = sum(len(s.tensors) for s in shards)
        stated = shards[0].split_value("tensors.count", num_tensors)
        if stated != num_tensors:
            raise ModelFileError(
                f"{shards[0].path}: split.tensors.count is {stated}, but the shards hold {num_tensors}"
            )
    return shards


def _read_shard(path: Path, with_texts: bool) -> Shard:
    mapped = map_file(path)
    try:
        reader = _HeaderReader(path, mapped, with_texts)
        version, num_tensors, num_keys = reader.counts()
        metadata, spans = reader.metadata(num_keys)
        tensors = reader.tensors(num_tensors, _alignment(path, metadata))
        return Shard(path, mapped, version, metadata, tensors, spans)
    except BaseException:
        close_map(mapped)
        raise


def map_file(path: Path) -> mmap.mmap:
    """The whole file, read-only; ModelFileError where it is none or has less than a magic number."""
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error})") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path}: is no regular file")
        if status.st_size < len(MAGIC):
            raise ModelFileError(f"{path}: is no model file, it has {status.st_size} bytes")
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be mapped into memory ({error.strerror})") from None
    finally:
        os.close(fd)


def close_map(mapped: mmap.mmap | None) -> None:
    """Ends a mapping, now or with the last array over it."""
    if mapped is not None:
        try:
            mapped.close()
        except BufferError:
            return  # an array still points into it: the mapping ends with the array


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1) or value > 1 << 30:
        raise ModelFileError(f"{path}: general.alignment is no power of two")
    return value


def shown(name: str) -> str:
    """A name from the file as it may stand in a message: quoted, on one line, not too long."""
    return repr(name if len(name) <= 80 else name[:80] + "…")


class _HeaderReader:
    """A cursor over the header. what: the thing that is read, for the message when the file ends or is wrong there."""

    def __init__(self, path: Path, mapped: mmap.mmap, with_texts: bool) -> None:
        self._path = path
        self._map = mapped
        self._with_texts = with_texts
        self._size = len(mapped)
        self._pos = 0

    def counts(self) -> tuple[int, int, int]:
        """version, number of tensors, number of metadata keys."""
        if self._map[:4] != MAGIC:
            is_older = self._map[:4] in OLD_MAGICS
            raise self._bad("is a file of the kind ggml" if is_older else "is no GGUF file (wrong magic)")
        self._pos = 4
        version = self._number(_U32, "version")
        if version & 0xFFFF == 0:
            raise self._bad("is a big-endian GGUF file, which is not supported")
        if version not in _VERSIONS:
            raise self._bad(f"is GGUF version {version}; versions 2 and 3 are supported")
        num_tensors = self._number(_U64, "tensor count")
        num_keys = self._number(_U64, "key count")
        self._check_count(num_keys, _MIN_KEY_BYTES, "header counts {} metadata keys")
        self._check_count(num_tensors, _MIN_TENSOR_BYTES, "header counts {} tensors")
        return version, num_tensors, num_keys

    def metadata(self, num_keys: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        """The values that are wanted, and where each value begins with its type, and ends."""
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for i in range(num_keys):
            key = self._string(f"metadata key {i}", _MAX_NAME_BYTES)
            if key in metadata:
                raise self._bad(f"key {shown(key)} occurs twice")
            what = f"key {shown(key)}"
            begin = self._pos
            type_id = self._number(_U32, what)
            metadata[key] = self._array(what) if type_id == _ARRAY else self._scalar(type_id, what)
            spans[key] = begin, self._pos
        return {key: value for key, value in metadata.items() if value is not None}, spans

    def tensors(self, num_tensors: int, alignment: int) -> dict[str, GgufTensorInfo]:
        """The tensors in file order, all inside the file and apart from each other."""
        found: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
        for i in range(num_tensors):
            name = self._string(f"name of tensor {i}", _MAX_NAME_BYTES)
            if name in found:
                raise self._bad(f"tensor {shown(name)} occurs twice")
            found[name] = self._tensor(f"tensor {shown(name)}", alignment)
        data_start = -(-self._pos // alignment) * alignment
        end = data_start
        for name, (_, _, n_bytes, offset) in sorted(found.items(), key=lambda item: item[1][3]):
            if data_start + offset < end:
                raise self._bad(f"tensor {shown(name)} overlaps another one")
            end = data_start + offset + n_bytes
            if end > self._size:
                raise self._bad(f"tensor {shown(name)} ends at byte {end}, the file at {self._size}")
        return {
            name: GgufTensorInfo(name, shape, type_id, n_bytes, 0, data_start + offset)
            for name, (shape, type_id, n_bytes, offset) in found.items()
        }

    def _tensor(self, what: str, alignment: int) -> tuple[tuple[int, ...], int, int, int]:
        """(shape, type id, bytes, offset in the data section) of the entry at the cursor, behind its name."""
        n_dims = self._number(_U32, what)
        if n_dims > _MAX_DIMS:
            raise self._bad(f"{what} has {n_dims} dimensions, at most {_MAX_DIMS} are allowed")
        dims = [self._number(_U64, what) for _ in range(n_dims)]
        type_id = self._number(_U32, what)
        offset = self._number(_U64, what)
        block = GGML_BY_ID.get(type_id)
        if block is None:
            raise self._bad(f"{what} has the unknown type {type_id}")
        row = dims[0] if dims else 1
        if 0 in dims or row % block.block_length:
            raise self._bad(f"{what} has the impossible dimensions {dims} for type {block.name}")
        n_bytes = row // block.block_length * block.block_bytes
        for dim in dims[1:]:
            n_bytes *= dim
        if n_bytes > self._size:
            raise self._bad(f"{what} with dimensions {dims} is larger than the file")
        if offset % alignment:
            raise self._bad(f"{what} begins at {offset}, which is not aligned to {alignment}")
        return tuple(reversed(dims)), type_id, n_bytes, offset

    def _scalar(self, type_id: int, what: str) -> Any:
        if type_id == _STRING:
            return self._string(what)
        layout = _SCALARS.get(type_id)
        if layout is None:
            raise self._bad(f"{what} has the unknown value type {type_id}")
        return self._number(layout, what)

    def _array(self, what: str) -> list[str] | npt.NDArray[Any] | None:
        """None for strings that are not wanted."""
        type_id = self._number(_U32, what)
        count = self._number(_U64, what)
        if type_id == _STRING:
            self._check_count(count, _U64.size, f"{what} counts {{}} strings")
            return self._strings(count, what)
        if type_id not in _ARRAY_DTYPES:
            raise self._bad(f"{what} is an array of the unsupported type {type_id}")
        dtype = np.dtype(_ARRAY_DTYPES[type_id])
        self._check_count(count, dtype.itemsize, f"{what} counts {{}} numbers")
        # Bytes other than 0 and 1 are no valid numpy booleans: compared, not reinterpreted.
        raw = np.frombuffer(self._map, "u1" if type_id == _BOOL else dtype, count, self._pos)
        self._pos += count * dtype.itemsize
        return raw != 0 if type_id == _BOOL else raw.copy()

    def _strings(self, count: int, what: str) -> list[str] | None:
        data = np.frombuffer(self._map, np.uint8)
        try:
            if self._with_texts:
                strings, self._pos = read_strings(data, self._pos, count)
                return strings
            self._pos = skip_strings(data, self._pos, count)
        except EOFError:
            raise self._ends(what) from None
        except UnicodeDecodeError:
            raise self._bad(f"{what} holds a string that is not UTF-8") from None
        return None

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._number(_U64, what)
        if limit is not None and length > limit:
            raise self._bad(f"{what} is {length} bytes long, at most {limit} are allowed")
        if length > self._size - self._pos:
            raise self._ends(what)
        raw = self._map[self._pos : self._pos + length]
        self._pos += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._bad(f"{what} is not UTF-8") from None

    def _number(self, layout: Struct, what: str) -> Any:
        if layout.size > self._size - self._pos:
            raise self._ends(what)
        (value,) = layout.unpack_from(self._map, self._pos)
        self._pos += layout.size
        return value

    def _check_count(self, count: int, min_bytes: int, sentence: str) -> None:
        if count * min_bytes > self._size - self._pos:
            raise self._bad(f"{sentence.format(count)}, more than the rest of the file can hold")

    def _ends(self, what: str) -> ModelFileError:
        return self._bad(f"is truncated, it ends inside {what}")

    def _bad(self, sentence: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: {sentence}")
