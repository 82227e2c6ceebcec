"""Quantises a model's files into others, tensor by tensor: what is in memory is never more than a piece of one."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.formats import BY_NAME, BlockFormat
from kernels.reference.quant import dequantize as decode
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


Progress = Callable[[str, int], None]
"""Called with a tensor's name and how many bytes of the source are done since the last call."""


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

    ModelFileError for a tensor that is no weight's, and an importance matrix of another model.
    """
    steps = []
    for source in sources:
        old = source.stored_form
        if not old.is_decodable:
            stored = source.parts[0]
            raise ModelFileError(f"{stored.file}: tensor {stored.name!r} has type {old.name}, no weight's")
        chosen = recipe.type_of(source.gguf_name, source.shape, facts)
        form = old if chosen is None else chosen[1].form
        # As llama.cpp wants its norms and routers; and what a shift has been added to has no type of its own.
        if chosen is None and (source.shift or (needs_gguf and _is_float32(source))):
            form = BY_NAME["F32"]
        counts = None
        if importance is not None and chosen is not None and form.name != old.name:
            counts = importance_of(source, importance)
        steps.append(Step(source, form, None if chosen is None else chosen[0], counts))
    _report(steps)
    if importance is not None:
        _report_importance(steps)
    return steps


def _is_float32(source: Source) -> bool:
    return len(source.shape) == 1 or ".ffn_gate_inp." in source.gguf_name


def _report_importance(steps: Sequence[Step]) -> None:
    changed = [step for step in steps if step.wanted is not None and step.form.name != step.source.stored_form.name]
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
        for number, part in enumerate(step.source.parts):
            expect_pages(part.data)
            try:
                for data, source_bytes in _encoded(step, number, part):
                    sink.write(data.numpy())
                    progress(step.name, source_bytes)
            except ValueError as error:
                raise ModelFileError(f"{part.file}: tensor {part.name!r}: {error}") from error
            drop_pages(part.data)


def _encoded(step: Step, number: int, stored: StoredTensor) -> Iterator[tuple[Tensor, int]]:
    """A part's new bytes in pieces, and how many of the source each came from."""
    form, shift = step.form, step.source.shift
    # A bias in another order is a column of rows, a number by itself a row of one.
    is_column = len(stored.shape) == 0 or (len(stored.shape) == 1 and stored.row_order is not None)
    columns = 1 if is_column else stored.shape[-1]
    num_rows = num_elements(stored.shape) // max(1, columns)
    rows = as_tensor(stored.data).view(num_rows, -1)
    row_bytes = rows.shape[1]
    is_same = form.name == stored.form.name and not shift
    whole = form.name in _WHOLE
    out = torch.empty(0, dtype=torch.uint8)
    for expert_rows, weights in _experts(num_rows, columns, _importance_of_part(step, number, columns)):
        for piece in pieces(len(expert_rows), row_bytes, stored.data.size if whole else PIECE_BYTES):
            part = slice(expert_rows.start + piece.start, expert_rows.start + piece.stop)
            source = rows[part] if stored.row_order is None else rows[stored.row_order[part]]
            if is_same:
                yield source, source.nbytes
            elif shift:
                values = decode(stored.form, source) + shift
                yield values.view(torch.uint8), source.nbytes
            else:
                size = (len(source), form.row_bytes(columns))
                if out.shape[:1] != size[:1]:
                    out = torch.empty(size, dtype=torch.uint8)
                yield requantize(stored.form.name, source, QuantType(form.name), weights, out), source.nbytes
            if stored.row_order is None:
                drop_pages(stored.data[part.start * row_bytes : part.stop * row_bytes])


def _importance_of_part(step: Step, number: int, columns: int) -> Tensor | None:
    """Of a part that is an expert: its own, where each has one."""
    counts = step.importance
    if counts is None or len(step.source.parts) == 1 or len(counts) == columns:
        return counts
    return counts[number * columns : (number + 1) * columns]


def _experts(num_rows: int, columns: int, counts: Tensor | None) -> Iterator[tuple[range, Tensor | None]]:
    """Ranges of rows that share an importance: one, or one for each expert."""
    experts = 1 if counts is None else len(counts) // columns
    each = num_rows // experts
    for e in range(experts):
        yield range(e * each, (e + 1) * each), None if counts is None else counts[e * columns : (e + 1) * columns]


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
    """LaunchError with the reason where a GGUF cannot hold the type."""
    if not recipe.base.is_gguf:
        known = "knows it for activations only" if recipe.base.startswith("Q8") else "has no such type"
        raise LaunchError(
            f"{recipe.base} cannot be written as .gguf: ggml {known}. "
            "Give -o a folder, for SafeTensors that Sirocco loads."
        )
