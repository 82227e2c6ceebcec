"""A quantised GGUF, with tokenizer and chat template: out of another one, or of a Llama-like model's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.formats import BY_NAME
from serve_app.layers.rotary import RopeScaling, inverse_frequencies
from serve_app.loaders.checkpoint import StoredTensor
from serve_app.loaders.gguf_metadata import metadata_of_folder
from serve_app.loaders.gguf_writer import GgufWriter, TensorPlan, encoded, raw_metadata
from serve_app.loaders.load import find_args, open_checkpoint
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.name_map import gguf_name, half_split_order, rotary_heads
from serve_app.loaders.quantized import Progress, Step, plan_steps, require_gguf_types, run_steps, with_row_order
from serve_app.models.llama import LlamaArgs
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import ModelFacts, Recipe

_QUANTISATION_VERSION = 2
_ROPE = "rope_freqs.weight"
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
    """The steps from a model to a GGUF; LaunchError for a type that none holds, or a model that none is made of."""
    require_gguf_types(recipe)
    stored = list(open_checkpoint(files).stored())
    if files.gguf_metadata is not None:
        tensors = [(tensor, tensor.name, tensor.name) for tensor in stored]
        facts = gguf_facts(files.gguf_metadata, "output.weight" in {t.name for t in stored}, importance is not None)
        return plan_steps(tensors, recipe, facts, needs_gguf=True)
    config = files.config or {}
    metadata_of_folder(files.folder, config, files.model_name)  # refuses before anything is written
    is_tied = bool(config.get("tie_word_embeddings")) or all(t.name != "lm_head.weight" for t in stored)
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    tensors = []
    for tensor in stored:
        if tensor.name.endswith("rotary_emb.inv_freq") or (is_tied and tensor.name == "lm_head.weight"):
            continue
        name = gguf_name(tensor.name)
        turned = rotary_heads("llama", tensor.name, heads, kv_heads)
        order = None if turned is None else torch.argsort(half_split_order(tensor.shape[0], turned))
        tensors.append((with_row_order(tensor, order), name, name))
    tensors += _rope_divisors(files)
    facts = ModelFacts("llama", int(config["num_hidden_layers"]), heads, kv_heads, 0, is_tied, importance is not None)
    return plan_steps(tensors, recipe, facts, needs_gguf=True)


def _rope_divisors(files: ModelFiles) -> list[tuple[StoredTensor, str, str]]:
    """What a GGUF has in place of Llama 3's scaling: a divisor for each frequency."""
    _, args = find_args(files)
    assert isinstance(args, LlamaArgs)
    if args.rope.scaling.kind != "llama3":
        return []
    plain, scaled = (
        inverse_frequencies(args.rotary_dim, args.rope.theta, scaling) for scaling in (RopeScaling(), args.rope.scaling)
    )
    divisors = (plain / scaled).numpy()
    stored = StoredTensor(files.config_file, _ROPE, BY_NAME["F32"], divisors.shape, divisors.view(np.uint8))
    return [(stored, _ROPE, _ROPE)]


def _metadata(files: ModelFiles) -> dict[str, bytes]:
    """That of the GGUF itself, as it is, or one made of the folder's files."""
    if files.gguf_metadata is None:
        return metadata_of_folder(files.folder, files.config or {}, files.model_name)
    found = raw_metadata(files.weight_files[0])
    return {k: value for k, value in found.items() if k not in _DROPPED and not k.startswith("split.")}


def write_gguf(
    path: Path,
    files: ModelFiles,
    recipe: Recipe,
    steps: Sequence[Step],
    importance: Importance | None,
    progress: Progress,
) -> None:
    """Writes the file; nothing bears its name until it is whole."""
    metadata = _metadata(files)
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
