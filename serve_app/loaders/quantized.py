"""Quantises a model's files into others, tensor by tensor: what is in memory is never more than a piece of one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from kernels.formats import BlockFormat
from serve_app.loaders.checkpoint import Recoding, StoredTensor, num_elements
from serve_app.loaders.recode import Progress, blocks_of
from serve_app.quant.quant_type import QuantType

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor that is to be written. name: as it will be called; gguf_name: as types and importance go by.

    parts: as they are stored, one or one for each expert, which follow each other. shape: of the whole. shift: what is
    added to each number.
    """

    name: str
    gguf_name: str
    parts: tuple[StoredTensor, ...]
    shape: tuple[int, ...]
    shift: float = 0.0

    @staticmethod
    def of(stored: StoredTensor, gguf_name: str) -> "Source":
        """A stored tensor under its own name."""
        return Source(stored.name, gguf_name, (stored,), stored.shape)

    @property
    def stored_form(self) -> BlockFormat:
        """The type of all parts."""
        return self.parts[0].form

    @property
    def num_bytes(self) -> int:
        """Bytes in the source."""
        return sum(part.data.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor's way. form: as it will be; wanted: before any fallback.

    importance: float32 [columns], or [experts * columns]; None where all columns count alike.
    """

    source: Source
    form: BlockFormat
    wanted: QuantType | None
    importance: Tensor | None = None

    @property
    def name(self) -> str:
        """As the tensor will be called."""
        return self.source.name

    @property
    def is_changed(self) -> bool:
        """Whether its bytes become others."""
        return self.form.name != self.source.stored_form.name or self.source.shift != 0

    def targets(self) -> tuple[StoredTensor, ...]:
        """The source's parts as they will be, to be recoded while they are read."""
        parts = self.source.parts
        if not self.is_changed:
            return parts
        whole = Recoding(self.source.stored_form, self.importance, self.source.shift)
        columns = self.source.shape[-1] if self.source.shape else 1
        recodings = [whole] if len(parts) == 1 else [whole.of_expert(e, columns) for e in range(len(parts))]
        return tuple(
            replace(part, form=self.form, recoding=recoding) for part, recoding in zip(parts, recodings, strict=True)
        )


class Sink(Protocol):
    """Where quantised tensors go."""

    def begin(self) -> None:
        """The next tensor begins."""
        ...

    def write(self, data: Any) -> None:
        """Its next bytes."""
        ...


def run_steps(steps: Sequence[Step], sink: Sink, progress: Progress) -> None:
    """Writes every tensor. ModelFileError naming the tensor whose values cannot be encoded."""
    for step in steps:
        sink.begin()
        for part in step.targets():
            for _, blocks in blocks_of(part, partial(_advance, progress, step.name)):
                sink.write(blocks.numpy())


def _advance(progress: Progress, name: str, _: str, num_bytes: int) -> None:
    """Progress goes by what a tensor will be called, not by how its parts are."""
    progress(name, num_bytes)


def bits_per_weight(steps: Sequence[Step]) -> float:
    """The mean over all tensors of what they will take, norms included."""
    targets = [target for step in steps for target in step.targets()]
    return 8 * sum(t.num_bytes for t in targets) / max(1, sum(num_elements(t.shape) for t in targets))


def report_fallbacks(steps: Sequence[Step]) -> None:
    """A line in the log for the tensors whose rows the wanted type does not divide."""
    fallen: dict[str, list[str]] = {}
    for step in steps:
        if step.wanted is not None and step.wanted != step.form.name:
            fallen.setdefault(f"{step.wanted} → {step.form.name}", []).append(step.name)
    for change, names in fallen.items():
        logger.warning("rows are no whole blocks, %s: %s", change, ", ".join(names))
