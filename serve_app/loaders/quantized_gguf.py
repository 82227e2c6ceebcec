"""A quantised GGUF, with tokenizer and chat template: out of another one, or of a Llama-like model's folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kernels.formats import BY_NAME
from serve_app.errors import ModelFileError
from serve_app.layers.rotary import RopeScaling, inverse_frequencies
from serve_app.loaders.checkpoint import StoredTensor
from serve_app.loaders.gguf_metadata import args_of_folder, metadata_of_folder
from serve_app.loaders.gguf_writer import GgufWriter, TensorPlan, encoded, raw_metadata
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.name_map import gguf_name, half_split_order, rotary_heads
from serve_app.loaders.quantized import Step, plan_steps, require_gguf_types, run_steps, stored_tensors, with_row_order
from serve_app.loaders.quantized_as_stored import plan_as_stored
from serve_app.loaders.recode import Progress
from serve_app.models.decoder_args import DecoderArgs
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import ModelFacts, Recipe

_QUANTISATION_VERSION = 2
_ROPE = "rope_freqs.weight"
_DROPPED = ("general.file_type", "general.quantization_version", "general.alignment")


def plan_gguf(files: ModelFiles, recipe: Recipe, importance: Importance | None) -> list[Step]:
    """The steps from a model to a GGUF; LaunchError for a type that none holds, or a model that none is made of."""
    require_gguf_types(recipe)
    stored = stored_tensors(files)
    if files.gguf_metadata is not None:
        return plan_as_stored(files, stored, recipe, importance, needs_gguf=True)
    args = args_of_folder(files)
    metadata_of_folder(files, args)  # refuses before anything is written
    is_tied = bool(args.tie_word_embeddings) or not any(tensor.name == "lm_head.weight" for tensor in stored)
    tensors = []
    for tensor in stored:
        if tensor.name.endswith("rotary_emb.inv_freq") or (is_tied and tensor.name == "lm_head.weight"):
            continue
        name = gguf_name(tensor.name)
        if name == tensor.name:
            raise ModelFileError(f"{tensor.file}: tensor {tensor.name!r} has no name in a GGUF")
        turned = rotary_heads("llama", tensor.name, args.n_heads, args.n_kv_heads)
        order = None if turned is None else torch.argsort(half_split_order(tensor.shape[0], turned))
        tensors.append((with_row_order(tensor, order), name, name))
    tensors += _rope_divisors(files, args)
    facts = ModelFacts("llama", args.n_layers, args.n_heads, args.n_kv_heads, is_tied=is_tied)
    return plan_steps(tensors, recipe, facts, importance, needs_gguf=True)


def _rope_divisors(files: ModelFiles, args: DecoderArgs) -> list[tuple[StoredTensor, str, str]]:
    """What a GGUF has in place of Llama 3's scaling: a divisor for each frequency."""
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
        return metadata_of_folder(files, args_of_folder(files))
    found = raw_metadata(files.weight_files[0])
    return {k: value for k, value in found.items() if k not in _DROPPED and not k.startswith("split.")}


def write_gguf(path: Path, files: ModelFiles, recipe: Recipe, steps: Sequence[Step], progress: Progress) -> None:
    """Writes the file; nothing bears its name until it is whole."""
    metadata = _metadata(files)
    metadata["general.quantization_version"] = encoded(_QUANTISATION_VERSION)
    if recipe.file_type is not None:
        metadata["general.file_type"] = encoded(recipe.file_type)
    writer = GgufWriter(path, metadata, [TensorPlan(s.name, s.form, s.stored.shape) for s in steps])
    try:
        run_steps(steps, writer, progress)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
