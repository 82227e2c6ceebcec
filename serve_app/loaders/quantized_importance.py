"""The importance of columns, tensor by tensor, for a plan that was made without."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from serve_app.errors import ModelFileError
from serve_app.loaders.quantized import Source, Step
from serve_app.quant.imatrix import Importance

logger = logging.getLogger(__name__)

_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight")


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
