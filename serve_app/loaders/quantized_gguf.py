"""A quantised GGUF out of a GGUF: metadata, tokenizer and template go over as they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_app.errors import LaunchError
from serve_app.loaders.gguf_writer import GgufWriter, TensorPlan, encoded, raw_metadata
from serve_app.loaders.load import open_checkpoint
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.quantized import Progress, Step, plan_steps, require_gguf_types, run_steps
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import ModelFacts, Recipe

_QUANTISATION_VERSION = 2
_DROPPED = ("general.file_type", "general.quantization_version", "general.alignment")


def gguf_facts(metadata: dict[str, Any], has_head: bool, has_importance: bool) -> ModelFacts:
    """What the choice of types looks at, out of a GGUF's metadata."""
    architecture = str(metadata.get("general.architecture", ""))

    def number(key: str, default: int) -> int:
        value = metadata.get(f"{architecture}.{key}", default)
        return value if type(value) is int else default

    heads = number("attention.head_count", 1)
    return ModelFacts(
        architecture,
        number("block_count", 1),
        heads,
        number("attention.head_count_kv", heads),
        number("expert_count", 0),
        not has_head,
        has_importance,
    )


def plan_gguf(files: ModelFiles, recipe: Recipe, importance: Importance | None) -> list[Step]:
    """The steps from a GGUF to another; LaunchError for a type that none holds."""
    require_gguf_types(recipe)
    if files.gguf_metadata is None:
        raise LaunchError(f"{files.model_name}: only a GGUF can be quantised into a .gguf so far; give -o a folder.")
    stored = list(open_checkpoint(files).stored())
    has_head = any(tensor.name == "output.weight" for tensor in stored)
    facts = gguf_facts(files.gguf_metadata, has_head, importance is not None)
    return plan_steps([(tensor, tensor.name, tensor.name) for tensor in stored], recipe, facts, needs_gguf=True)


def write_gguf(
    path: Path,
    files: ModelFiles,
    recipe: Recipe,
    steps: Sequence[Step],
    importance: Importance | None,
    progress: Progress,
) -> None:
    """Writes the file; nothing bears its name until it is whole."""
    metadata = {
        key: value
        for key, value in raw_metadata(files.weight_files[0]).items()
        if key not in _DROPPED and not key.startswith("split.")
    }
    metadata["general.quantization_version"] = encoded(_QUANTISATION_VERSION)
    if recipe.file_type is not None:
        metadata["general.file_type"] = encoded(recipe.file_type)
    writer = GgufWriter(path, metadata, [TensorPlan(s.name, s.form, s.stored.shape) for s in steps])
    try:
        run_steps(steps, writer, importance, progress)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
