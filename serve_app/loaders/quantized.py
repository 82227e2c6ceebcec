"""Quantises a model's files into others, tensor by tensor: what is in memory is never more than a piece of one."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.formats import BY_NAME, BlockFormat
from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.checkpoint import StoredTensor, num_elements
from serve_app.loaders.pages import as_tensor, drop_pages, expect_pages
from serve_app.quant.encode import pieces, requantize
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import ModelFacts, Recipe
from serve_app.quant.quant_type import QuantType

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 << 20
_WHOLE = (QuantType.HQQ4, QuantType.HQQ8)


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor's way: stored as it is in the source; name and form as they will be; wanted: before any fallback."""

    stored: StoredTensor
    name: str
    gguf_name: str
    form: BlockFormat
    wanted: QuantType | None


class Sink(Protocol):
    """Where quantised tensors go."""

    def begin(self) -> Any:
        """The next tensor begins."""
        ...

    def write(self, data: Any) -> None:
        """Its next bytes."""
        ...


Progress = Callable[[str, int], None]
"""Called with a tensor's name and how many bytes of the source are done since the last call."""


def plan_steps(
    tensors: Sequence[tuple[StoredTensor, str, str]], recipe: Recipe, facts: ModelFacts, *, needs_gguf: bool
) -> list[Step]:
    """What becomes of each tensor (as stored, its new name, its GGUF name); what fell back is logged in one line."""
    steps = []
    for stored, name, gguf_name in tensors:
        if not stored.form.is_decodable:
            raise ModelFileError(f"{stored.file}: tensor {stored.name!r} has type {stored.form.name}, no weight's")
        chosen = recipe.type_of(gguf_name, stored.shape, facts)
        form = stored.form if chosen is None else chosen[1].form
        if needs_gguf and chosen is None and len(stored.shape) == 1:
            form = BY_NAME["F32"]  # as llama.cpp wants its norms
        steps.append(Step(stored, name, gguf_name, form, None if chosen is None else chosen[0]))
    _report(steps)
    return steps


def _report(steps: Sequence[Step]) -> None:
    fallen: dict[str, list[str]] = {}
    for step in steps:
        if step.wanted is not None and step.wanted != step.form.name:
            fallen.setdefault(f"{step.wanted} → {step.form.name}", []).append(step.name)
    for change, names in fallen.items():
        logger.warning("rows are no whole blocks, %s: %s", change, ", ".join(names))


def run_steps(steps: Sequence[Step], sink: Sink, importance: Importance | None, progress: Progress) -> None:
    """Writes every tensor. ModelFileError naming the tensor whose values cannot be encoded."""
    for step in steps:
        sink.begin()
        expect_pages(step.stored.data)
        try:
            for data, source_bytes in _encoded(step, importance):
                sink.write(data.numpy())
                progress(step.name, source_bytes)
        except ValueError as error:
            raise ModelFileError(f"{step.stored.file}: tensor {step.stored.name!r}: {error}") from error
        drop_pages(step.stored.data)


def _encoded(step: Step, importance: Importance | None) -> Iterator[tuple[Tensor, int]]:
    """The tensor's new bytes in pieces, and how many of the source each came from."""
    stored, form = step.stored, step.form
    columns = stored.shape[-1]
    num_rows = num_elements(stored.shape[:-1])
    rows = as_tensor(stored.data).view(num_rows, -1)
    row_bytes = rows.shape[1]
    is_same = form.name == stored.form.name
    counts = None if is_same else importance_of(step, importance, columns)
    whole = stored.row_order is None and form.name in _WHOLE
    out = torch.empty(0, dtype=torch.uint8)
    for expert_rows, weights in _experts(num_rows, columns, counts):
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


def importance_of(step: Step, importance: Importance | None, columns: int) -> Tensor | None:
    """The importance of a tensor's columns; ModelFileError for one of another size."""
    values = None if importance is None else importance.get(step.gguf_name)
    if values is None:
        return None
    experts = step.stored.shape[0] if len(step.stored.shape) == 3 else 1
    if values.size not in (columns, experts * columns):
        raise ModelFileError(
            f"the importance matrix has {values.size} values for {step.gguf_name!r}, whose rows have {columns} weights"
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
