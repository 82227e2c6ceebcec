"""Quantises a model's files into others, tensor by tensor: what is in memory is never more than a piece of one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor's way: stored as it is in the source; name and form as they will be; wanted: before any fallback.

    gguf_name: what an importance matrix calls it. importance: float32 [columns], or [experts * columns]; None where all
    columns count alike.
    """

    stored: StoredTensor
    name: str
    form: BlockFormat
    wanted: QuantType | None
    gguf_name: str
    importance: Tensor | None = None

    @property
    def is_changed(self) -> bool:
        """Whether its bytes become others."""
        return self.form.name != self.stored.form.name

    def target(self) -> StoredTensor:
        """The tensor as it will be, to be recoded while it is read."""
        if not self.is_changed:
            return self.stored
        return replace(self.stored, form=self.form, recoding=Recoding(self.stored.form, self.importance))


class Sink(Protocol):
    """Where quantised tensors go."""

    def begin(self) -> None:
        """The next tensor begins."""
        ...

    def write(self, data: Any) -> None:
        """Its next bytes."""
        ...


def stored_tensors(files: ModelFiles) -> list[StoredTensor]:
    """All tensors of a model; ModelFileError where weights are among them that cannot be read."""
    checkpoint = open_checkpoint(files)
    if isinstance(checkpoint, SafetensorsCheckpoint):
        checkpoint.require_readable_weights()
    return list(checkpoint.stored())


def plan_steps(
    tensors: Sequence[tuple[StoredTensor, str, str]],
    recipe: Recipe,
    facts: ModelFacts,
    importance: Importance | None,
    *,
    needs_gguf: bool,
) -> list[Step]:
    """What becomes of each tensor (as stored, its new name, its GGUF name); what fell back is logged in one line.

    ModelFileError for a tensor that is no weight's, an importance matrix of another model, experts without a mixture,
    and a topology of a model with more layers.
    """
    if recipe.experts_only and not any(is_expert(gguf_name) for *_, gguf_name in tensors):
        raise ModelFileError("only experts are to be quantised (moqe), but this model has none")
    if recipe.topology is not None:
        recipe.topology.require_layers(facts.n_layers)
    steps = []
    for stored, name, gguf_name in tensors:
        if not stored.form.is_decodable:
            raise ModelFileError(f"{stored.file}: tensor {stored.name!r} has type {stored.form.name}, no weight's")
        chosen = recipe.type_of(gguf_name, stored.shape, facts, stored.name)
        form = stored.form if chosen is None else chosen[1].form
        if needs_gguf and chosen is None and len(stored.shape) == 1:
            form = BY_NAME["F32"]  # as llama.cpp wants its norms
        steps.append(Step(stored, name, form, None if chosen is None else chosen[0], gguf_name))
    _report(steps)
    return steps if importance is None else with_importance(steps, importance)


def with_importance(steps: Sequence[Step], importance: Importance) -> list[Step]:
    """The same steps, each with the importance of its columns. ModelFileError for one of another model."""
    found = []
    for step in steps:
        counts = None
        if step.wanted is not None and step.is_changed:
            counts = importance_of(step.stored, step.gguf_name, importance)
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
        for _, blocks in blocks_of(step.target(), progress):
            sink.write(blocks.numpy())


def bits_per_weight(steps: Sequence[Step]) -> float:
    """The mean over all tensors of what they will take, norms included."""
    targets = [step.target() for step in steps]
    return 8 * sum(t.num_bytes for t in targets) / max(1, sum(num_elements(t.shape) for t in targets))


def importance_of(stored: StoredTensor, gguf_name: str, importance: Importance) -> Tensor | None:
    """The importance of a matrix's columns, None without an entry; ModelFileError for one of another size."""
    values = importance.get(gguf_name)
    if values is None:
        return None
    columns = stored.shape[-1]
    experts = stored.shape[0] if len(stored.shape) == 3 else 1
    if values.size not in (columns, experts * columns):
        raise ModelFileError(
            f"the importance matrix has {values.size} values for {gguf_name!r}, whose rows have {columns} weights"
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


def with_row_order(stored: StoredTensor, order: Tensor | None) -> StoredTensor:
    """The tensor with its rows to be taken in another order."""
    return stored if order is None else replace(stored, row_order=order)
