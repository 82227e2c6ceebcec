"""A quantised GGUF, with tokenizer and chat template: out of another one, or of a model's folder."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.formats import BY_NAME
from serve_app.gguf_file import open_gguf
from serve_app.layers.rope_scaling import RopeScaling, inverse_frequencies
from serve_app.loaders.checkpoint import StoredTensor
from serve_app.loaders.gguf_args import gguf_values
from serve_app.loaders.gguf_writer import GgufWriter, TensorPlan, encoded
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.name_map import gguf_name, half_split_order, rotary_heads
from serve_app.loaders.opening import open_checkpoint, stated_args
from serve_app.loaders.quantized import (
    Source,
    Step,
    TokenizerForms,
    plan_steps,
    require_gguf_types,
    run_steps,
    stored_tensors,
)
from serve_app.loaders.quantized_as_stored import gguf_facts, plan_as_stored
from serve_app.loaders.recode import Progress
from serve_app.loaders.wanted import WantedTensor, wanted_tensors
from serve_app.models.decoder_args import DecoderArgs
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import Recipe

logger = logging.getLogger(__name__)

_QUANTISATION_VERSION = 2
_DROPPED = ("general.file_type", "general.quantization_version", "general.alignment")


def plan_gguf(
    files: ModelFiles, recipe: Recipe, importance: Importance | None, tokenizers: TokenizerForms
) -> list[Step]:
    """The steps from a model to a GGUF; LaunchError for a type that none holds, or a model that none is made of."""
    require_gguf_types(recipe)
    stored = stored_tensors(files)
    if files.gguf_metadata is not None:
        return plan_as_stored(files, stored, recipe, importance, needs_gguf=True)
    metadata = _values_of_folder(files, tokenizers)  # refuses before anything is written
    family, args = stated_args(files)
    assert isinstance(args, DecoderArgs)
    wanted, unused = wanted_tensors(family, args, open_checkpoint(files))
    unused = [name for name in unused if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")]
    if unused:
        logger.warning("%s: left out, for the model does not use them: %s", files.folder, ", ".join(unused))
    sources = [_source(tensor, args) for tensor in wanted]
    sources += [_own_source(files, name, values) for name, values in _rotary_divisors(args)]
    has_head = any(source.name == "output.weight" for source in sources)
    return plan_steps(sources, recipe, gguf_facts(metadata, has_head), importance, needs_gguf=True)


def _source(tensor: WantedTensor, args: DecoderArgs) -> Source:
    """A folder's tensor as GGUF has it: its name, rows of q and k in pairs, norms without an offset."""
    architecture = args.GGUF.architecture
    name, parts, shape = gguf_name(tensor.name, architecture), tensor.parts, tensor.shape
    heads = rotary_heads(architecture, tensor.name, args.n_heads, args.n_kv_heads)
    if heads is not None:
        order = torch.argsort(half_split_order(shape[0], heads))
        parts = tuple(replace(part, row_order=order) for part in parts)
    if name.endswith("ffn_gate_inp_shexp.weight"):  # a single row, which is a vector there
        shape = shape[1:]
    shift = getattr(args, "norm_offset", 0.0) if tensor.name.endswith("norm.weight") else 0.0
    return Source(name, name, parts, shape, shift)


def _own_source(files: ModelFiles, name: str, values: NDArray[np.float32]) -> Source:
    stored = StoredTensor(files.config_file, name, BY_NAME["F32"], values.shape, values.view(np.uint8))
    return Source.of(stored, name)


def _rotary_divisors(args: DecoderArgs) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """What a GGUF has in place of Llama 3's and longrope's settings: a divisor for each frequency."""
    scaling = args.rope.scaling
    if scaling.kind == "llama3":
        plain, scaled = (inverse_frequencies(args.rotary_dim, args.rope.theta, s) for s in (RopeScaling(), scaling))
        yield "rope_freqs.weight", (plain / scaled).numpy()
    if scaling.kind == "longrope":
        yield "rope_factors_long.weight", np.array(scaling.long_factor, np.float32)
        yield "rope_factors_short.weight", np.array(scaling.short_factor, np.float32)


def _values_of_folder(files: ModelFiles, tokenizers: TokenizerForms) -> dict[str, Any]:
    """Metadata made of the folder's files. LaunchError, with the reason, for what a GGUF cannot describe."""
    _, args = stated_args(files)
    assert isinstance(args, DecoderArgs)
    values = gguf_values(args, files.config_file)
    values |= {"general.type": "model", "general.name": files.model_name}
    return values | tokenizers.gguf_values(files.folder, files.config or {}, args.vocab_size, args.GGUF.pre_tokenizer)


def _metadata(files: ModelFiles, tokenizers: TokenizerForms) -> dict[str, bytes]:
    """That of the GGUF itself, as it is, or one made of the folder's files."""
    if files.gguf_metadata is None:
        return {key: encoded(value) for key, value in _values_of_folder(files, tokenizers).items()}
    if files.kind == "ggml":  # it was read into a GGUF's terms, arrays of numbers among them
        values = {"general.name": files.model_name, **files.gguf_metadata}
        return {k: encoded(v.tolist() if isinstance(v, np.ndarray) else v) for k, v in values.items()}
    with open_gguf(files.weight_files, with_texts=False) as file:
        found = file.raw_metadata()
    return {k: value for k, value in found.items() if k not in _DROPPED and not k.startswith("split.")}


def write_gguf(
    path: Path,
    files: ModelFiles,
    recipe: Recipe,
    steps: Sequence[Step],
    progress: Progress,
    tokenizers: TokenizerForms,
) -> None:
    """Writes the file; nothing bears its name until it is whole."""
    metadata = _metadata(files, tokenizers)
    metadata["general.quantization_version"] = encoded(_QUANTISATION_VERSION)
    if recipe.file_type is not None:
        metadata["general.file_type"] = encoded(recipe.file_type)
    writer = GgufWriter(path, metadata, [TensorPlan(step.name, step.form, step.source.shape) for step in steps])
    try:
        run_steps(steps, writer, progress)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
