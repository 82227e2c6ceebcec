"""Quantises a model's files into others, tensor by tensor: what is in memory is never more than a piece of one."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.formats import BY_NAME, BlockFormat
from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.checkpoint import Recoding, StoredTensor, num_elements
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.opening import open_checkpoint
from serve_app.loaders.recode import Progress, blocks_of
from serve_app.loaders.safetensors import SafetensorsCheckpoint
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import ModelFacts, Recipe, is_expert
from serve_app.quant.quant_type import QuantType

logger = logging.getLogger(__name__)

_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight")


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


class TokenizerForms(Protocol):
    """A tokenizer in the words of either format; text has it, which loaders do not know."""

    def gguf_values(
        self, folder: Path, config: Mapping[str, Any], vocab_size: int, pre_tokenizer: str | None
    ) -> dict[str, Any]:
        """A folder's tokenizer and chat template as keys and values of a GGUF; see text.gguf_tokenizer."""
        ...

    def write_files(self, folder: Path, metadata: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
        """A GGUF's as files of the folder; the ids of BOS and of the ends; see text.tokenizer_export."""
        ...


def stored_tensors(files: ModelFiles) -> list[StoredTensor]:
    """All tensors of a model; ModelFileError where weights are among them that cannot be read."""
    checkpoint = open_checkpoint(files)
    if isinstance(checkpoint, SafetensorsCheckpoint):
        checkpoint.require_readable_weights()
    return list(checkpoint.stored())


def plan_steps(
    sources: Sequence[Source], recipe: Recipe, facts: ModelFacts, importance: Importance | None, *, needs_gguf: bool
) -> list[Step]:
    """What becomes of each tensor; what fell back is logged in one line.

    ModelFileError for a tensor that is no weight's, an importance matrix of another model, experts without a mixture,
    and a topology of a model with more layers.
    """
    if recipe.experts_only and not any(is_expert(source.gguf_name) for source in sources):
        raise ModelFileError("only experts are to be quantised (moqe), but this model has none")
    if recipe.topology is not None:
        recipe.topology.require_layers(facts.n_layers)
    steps = []
    for source in sources:
        old, stored = source.stored_form, source.parts[0]
        if not old.is_decodable:
            raise ModelFileError(f"{stored.file}: tensor {stored.name!r} has type {old.name}, no weight's")
        chosen = recipe.type_of(source.gguf_name, source.shape, facts, source.name)
        form = old if chosen is None else chosen[1].form
        # As llama.cpp wants its norms and routers; and what a shift has been added to has no type of its own.
        if chosen is None and (source.shift or (needs_gguf and _is_float32(source))):
            form = BY_NAME["F32"]
        steps.append(Step(source, form, None if chosen is None else chosen[0]))
    _report(steps)
    return steps if importance is None else with_importance(steps, importance)


def _is_float32(source: Source) -> bool:
    return len(source.shape) == 1 or ".ffn_gate_inp." in source.gguf_name


def with_importance(steps: Sequence[Step], importance: Importance) -> list[Step]:
    """The same steps, each with the importance of its columns. ModelFileError for one of another model."""
    found = []
    for step in steps:
        counts = None
        if step.wanted is not None and step.is_changed:
            counts = importance_of(step.source, importance)
        found.append(replace(step, importance=counts))
    _report_importance(found)
    return found


def _report_importance(steps: Sequence[Step]) -> None:
    changed = [step for step in steps if step.wanted is not None and step.is_changed]
    without = [step.name for step in changed if step.importance is None]
    if changed and len(without) == len(changed):
        raise ModelFileError("the importance matrix has no entry for any tensor of this model")
    if without:
        logger.warning("no entry in the importance matrix, all columns count alike: %s", ", ".join(without))


def _report(steps: Sequence[Step]) -> None:
    fallen: dict[str, list[str]] = {}
    for step in steps:
        if step.wanted is not None and step.wanted != step.form.name:
            fallen.setdefault(f"{step.wanted} → {step.form.name}", []).append(step.name)
    for change, names in fallen.items():
        logger.warning("rows are no whole blocks, %s: %s", change, ", ".join(names))


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


def importance_of(source: Source, importance: Importance) -> Tensor | None:
    """The importance of a matrix's columns, None without an entry; ModelFileError for one of another size."""
    columns = source.shape[-1]
    values = importance.get(source.gguf_name)
    expert = _EXPERT.fullmatch(source.gguf_name)
    if values is None and expert is not None:
        # A tensor for each expert, while an importance matrix has one entry for all of them.
        together = importance.get(f"{expert[1]}_exps.weight")
        values = None if together is None else together[int(expert[2]) * columns :][:columns]
    if values is None:
        return None
    experts = source.shape[0] if len(source.shape) == 3 else 1
    if values.size not in (columns, experts * columns):
        raise ModelFileError(
            f"the importance matrix has {values.size} values for {source.gguf_name!r}, "
            f"whose rows have {columns} weights"
        )
    return torch.from_numpy(values)


def require_gguf_types(recipe: Recipe) -> None:
    """LaunchError with the reason where a GGUF cannot hold a type."""
    for wanted in recipe.types:
        if not wanted.is_gguf:
            known = "knows it for activations only" if wanted.startswith("Q8") else "has no such type"
            raise LaunchError(
                f"{wanted} cannot be written as .gguf: ggml {known}. "
                "Give -o a folder, for SafeTensors that Sirocco loads."
            )
