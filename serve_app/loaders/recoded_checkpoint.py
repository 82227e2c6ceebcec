"""Checkpoints whose tensors are quantised while they are loaded, or were so at an earlier start."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from serve_app.loaders.checkpoint import Checkpoint, StoredTensor
from serve_app.loaders.quantized import Step
from serve_app.loaders.safetensors import SafetensorsCheckpoint


class RecodedCheckpoint:
    """See Checkpoint: another one's tensors, each on the way to the type that a plan has for it."""

    def __init__(self, source: Checkpoint, steps: Sequence[Step]) -> None:
        """steps: one for each stored tensor, which is its only part, under their stored names."""
        self._source = source
        self._targets = {target.name: target for step in steps for target in step.targets()}

    @property
    def label(self) -> str:
        """The source's."""
        return self._source.label

    def find(self, name: str) -> StoredTensor | None:
        """See Checkpoint."""
        stored = self._source.find(name)
        return None if stored is None else self._target(stored)

    def stored_name(self, name: str) -> str:
        """The source's."""
        return self._source.stored_name(name)

    def stored(self) -> Iterator[StoredTensor]:
        """See Checkpoint; shapes and names are the source's."""
        return (self._target(stored) for stored in self._source.stored())

    def _target(self, stored: StoredTensor) -> StoredTensor:
        """Shape and order of rows are those that the source gives under the name that was asked for."""
        target = self._targets[stored.name]
        return replace(stored, form=target.form, recoding=target.recoding)


class CachedCheckpoint(RecodedCheckpoint):
    """The same, done before: the bytes are another file's."""

    def __init__(self, source: Checkpoint, steps: Sequence[Step], done: SafetensorsCheckpoint) -> None:
        """done: has every tensor under its stored name."""
        super().__init__(source, steps)
        self._done = done

    def _target(self, stored: StoredTensor) -> StoredTensor:
        done = self._done.find(stored.name)
        assert done is not None
        return replace(stored, file=done.file, form=done.form, data=done.data)
