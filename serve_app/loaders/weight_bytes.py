"""How much memory a model's weights take in a type, without making them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.loaders.checkpoint import StoredTensor, num_elements
from serve_app.loaders.load import find_args
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.name_map import gguf_name
from serve_app.loaders.quantized import stored_tensors
from serve_app.loaders.quantized_gguf import gguf_facts
from serve_app.options import IsqOptions
from serve_app.quant.mix import ModelFacts, Recipe


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """kept: of all tensors as they will be. working: what making them takes besides, two of the largest tensors.
    source: of the files' tensors."""

    kept: int
    working: int
    source: int


def weight_bytes(files: ModelFiles, isq: IsqOptions | None) -> WeightBytes:
    """For the types of the files themselves where isq is None or names no type. A topology is not looked at.

    Raises ModelFileError for files that cannot be read, ValueError for an unknown type.
    """
    stored = stored_tensors(files)
    source = sum(tensor.data.size for tensor in stored)
    largest = max((tensor.data.size for tensor in stored), default=0)
    if isq is None or isq.type is None:
        return WeightBytes(source, 2 * largest, source)
    recipe = Recipe.parse(isq.type, promotes=not isq.is_pure)
    facts, is_gguf = _facts(files, stored), files.kind == "gguf"
    kept = sum(_kept(tensor, tensor.name if is_gguf else gguf_name(tensor.name), recipe, facts) for tensor in stored)
    return WeightBytes(kept, 2 * largest, source)


def _kept(tensor: StoredTensor, name: str, recipe: Recipe, facts: ModelFacts) -> int:
    chosen = recipe.type_of(name, tensor.shape, facts)
    if chosen is None:
        return int(tensor.data.size)
    columns = tensor.shape[-1]
    return num_elements(tensor.shape) // columns * chosen[1].form.row_bytes(columns)


def _facts(files: ModelFiles, stored: list[StoredTensor]) -> ModelFacts:
    has_head = any(tensor.name in ("output.weight", "lm_head.weight") for tensor in stored)
    if files.gguf_metadata is not None:
        return gguf_facts(files.gguf_metadata, has_head)
    config: Mapping[str, Any] = files.config or {}
    _, args = find_args(files)
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    is_tied = not has_head or bool(config.get("tie_word_embeddings", False))
    family = str(config.get("model_type", ""))
    return ModelFacts(family, args.n_layers, args.n_heads, args.n_kv_heads, int(experts), is_tied)
