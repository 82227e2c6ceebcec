"""The tensors of a GGUF file by the names of Hugging Face checkpoints."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kernels.formats import BY_ID
from serve_app.errors import ModelFileError
from serve_app.gguf_file import GgufFile
from serve_app.loaders.checkpoint import StoredTensor
from serve_app.loaders.name_map import gguf_name, half_split_order, rotary_heads


class GgufCheckpoint:
    """A view of an open GGUF file, which must outlive the tensors taken from it."""

    def __init__(self, file: GgufFile, metadata: Mapping[str, Any] | None = None) -> None:
        """metadata: in the place of the file's own, which an option may have changed."""
        self._file = file
        self._metadata = file.metadata if metadata is None else metadata
        self._architecture = str(self._metadata.get("general.architecture", ""))
        self._heads: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """See Checkpoint."""
        return str(self._file.paths[0])

    def find(self, name: str) -> StoredTensor | None:
        """See Checkpoint."""
        stored_name = gguf_name(name, self._architecture)
        if stored_name not in self._file.tensors:
            return None
        stored = self._stored(stored_name)
        if len(stored.shape) == 1 and name.endswith(".shared_expert_gate.weight"):
            # One row, which GGUF keeps as a vector.
            return replace(stored, shape=(1, *stored.shape))
        heads = self._rotary_heads(name)
        if heads is None:
            return stored
        try:
            return replace(stored, row_order=half_split_order(stored.shape[0], heads))
        except ValueError as error:
            raise ModelFileError(f"{stored.file}: tensor {stored_name!r}: {error}") from error

    def stored_name(self, name: str) -> str:
        """See Checkpoint."""
        return gguf_name(name, self._architecture)

    def stored(self) -> Iterator[StoredTensor]:
        """See Checkpoint."""
        for name in sorted(self._file.tensors):
            yield self._stored(name)

    def _stored(self, name: str) -> StoredTensor:
        info = self._file.tensors[name]
        path = str(self._file.paths[info.shard])
        return StoredTensor(path, name, BY_ID[info.type_id], info.shape, self._file.data(name))

    def _rotary_heads(self, name: str) -> int | None:
        if rotary_heads(self._architecture, name, 1, 1) is None:
            return None
        if self._heads is None:
            n_heads = self._head_count("head_count", None)
            self._heads = n_heads, self._head_count("head_count_kv", n_heads)
        return rotary_heads(self._architecture, name, *self._heads)

    def _head_count(self, key: str, default: int | None) -> int:
        full_key = f"{self._architecture}.attention.{key}"
        value: Any = self._metadata.get(full_key, default)
        if type(value) is not int or value < 1:
            raise ModelFileError(f"{self.label}: key {full_key!r} is missing or no number of heads")
        return value
