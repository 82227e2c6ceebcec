"""Quantises a model's files into others, tensor by tensor: what is in memory is never more than a piece of one."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.formats import BY_NAME, BlockFormat
from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.checkpoint import StoredTensor, num_elements
from serve_app.loaders.load import open_checkpoint
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.pages import as_tensor, drop_pages, expect_pages
from serve_app.loaders.safetensors import SafetensorsCheckpoint
from serve_app.quant.encode import pieces, requantize
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import ModelFacts, Recipe
from serve_app.quant.quant_type import QuantType

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 << 20
_WHOLE = (QuantType.HQQ4, QuantType.HQQ8)
_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight")


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor's way: stored as it is in the source; name and form as they will be; wanted: before any fallback.

    importance: float32 [columns], or [experts * columns]; None where all columns count alike.
    """

    stored: StoredTensor
    name: str
    form: BlockFormat
    wanted: QuantType | None
    importance: Tensor | None = None


class Sink(Protocol):
    """Where quantised tensors go."""

    def begin(self) -> None:
        """The next tensor begins."""
        ...

    def write(self, data: Any) -> None:
        """Its next bytes."""
        ...


Progress = Callable[[str, int], None]
"""Called with a tensor's name and how many bytes of the source are done since the last call."""


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

    ModelFileError for a tensor that is no weight's, and an importance matrix of another model.
    """
    steps = []
    for stored, name, gguf_name in tensors:
        if not stored.form.is_decodable:
            raise ModelFileError(f"{stored.file}: tensor {stored.name!r} has type {stored.form.name}, no weight's")
        chosen = recipe.type_of(gguf_name, stored.shape, facts)
        form = stored.form if chosen is None else chosen[1].form
        if needs_gguf and chosen is None and len(stored.shape) == 1:
            form = BY_NAME["F32"]  # as llama.cpp wants its norms
        counts = None
        if importance is not None and chosen is not None and form.name != stored.form.name:
            counts = importance_of(stored, gguf_name, importance)
        steps.append(Step(stored, name, form, None if chosen is None else chosen[0], counts))
    _report(steps)
    if importance is not None:
        _report_importance(steps)
    return steps


def _report_importance(steps: Sequence[Step]) -> None:
    changed = [step for step in steps if step.wanted is not None and step.form.name != step.stored.form.name]
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
        expect_pages(step.stored.data)
        try:
            for data, source_bytes in _encoded(step):
                sink.write(data.numpy())
                progress(step.name, source_bytes)
        except ValueError as error:
            raise ModelFileError(f"{step.stored.file}: tensor {step.stored.name!r}: {error}") from error
        drop_pages(step.stored.data)


def _encoded(step: Step) -> Iterator[tuple[Tensor, int]]:
    """The tensor's new bytes in pieces, and how many of the source each came from."""
    stored, form = step.stored, step.form
    # A bias in another order is a column of rows, a number by itself a row of one.
    is_column = len(stored.shape) == 0 or (len(stored.shape) == 1 and stored.row_order is not None)
    columns = 1 if is_column else stored.shape[-1]
    num_rows = num_elements(stored.shape) // max(1, columns)
    rows = as_tensor(stored.data).view(num_rows, -1)
    row_bytes = rows.shape[1]
    is_same = form.name == stored.form.name
    whole = form.name in _WHOLE
    out = torch.empty(0, dtype=torch.uint8)
    for expert_rows, weights in _experts(num_rows, columns, step.importance):
        for piece in pieces(len(expert_rows), row_bytes, stored.data.size if whole else PIECE_BYTES):
            part = slice(expert_rows.start + piece.start, expert_rows.start + piece.stop)
            source = rows[part] if stored.row_order is None else rows[stored.row_order[part]]
            if is_same:
                yield source, source.nbytes
            else:
                size = (len(source), form.row_bytes(columns))
                if out.shape[:1] != size[:1]:
                    out = torch.empty(size, dtype=torch.uint8)
                yield requantize(stored.form.name, source, QuantType(form.name), weights, out), source.nbytes
            if stored.row_order is None:
                drop_pages(stored.data[part.start * row_bytes : part.stop * row_bytes])


def _experts(num_rows: int, columns: int, counts: Tensor | None) -> Iterator[tuple[range, Tensor | None]]:
    """Ranges of rows that share an importance: one, or one for each expert."""
    experts = 1 if counts is None else len(counts) // columns
    each = num_rows // experts
    for e in range(experts):
        yield range(e * each, (e + 1) * each), None if counts is None else counts[e * columns : (e + 1) * columns]


def importance_of(stored: StoredTensor, gguf_name: str, importance: Importance) -> Tensor | None:
    """The importance of a matrix's columns, None without an entry; ModelFileError for one of another size."""
    columns = stored.shape[-1]
    values = importance.get(gguf_name)
    expert = _EXPERT.fullmatch(gguf_name)
    if values is None and expert is not None:
        # A tensor for each expert, while an importance matrix has one entry for all of them.
        together = importance.get(f"{expert[1]}_exps.weight")
        values = None if together is None else together[int(expert[2]) * columns :][:columns]
    if values is None:
        return None
    experts = stored.shape[0] if len(stored.shape) == 3 else 1
    if values.size not in (columns, experts * columns):
        raise ModelFileError(
            f"the importance matrix has {values.size} values for {gguf_name!r}, whose rows have {columns} weights"
        )
    return torch.from_numpy(values)


def require_gguf_types(recipe: Recipe) -> None:
    """LaunchError with the reason where a GGUF cannot hold the type."""
    if not recipe.base.is_gguf:
        known = "knows it for activations only" if recipe.base.startswith("Q8") else "has no such type"
        raise LaunchError(
            f"{recipe.base} cannot be written as .gguf: ggml {known}. "
            "Give -o a folder, for SafeTensors that Sirocco loads."
        )


def with_row_order(stored: StoredTensor, order: Tensor | None) -> StoredTensor:
    """The tensor with its rows to be taken in another order."""
    return stored if order is None else replace(stored, row_order=order)
