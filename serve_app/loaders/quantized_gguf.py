"""A quantised GGUF, with tokenizer and chat template: out of another one, or of a model's folder."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.formats import BY_NAME
from serve_app.gguf_file import open_gguf
from serve_app.layers.rope_scaling import RopeScaling, inverse_frequencies
from serve_app.loaders.architecture import renamed
from serve_app.loaders.checkpoint import Checkpoint, StoredTensor
from serve_app.loaders.gguf_args import gguf_values
from serve_app.loaders.gguf_writer import GgufWriter, TensorPlan, encoded
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.name_map import gguf_name, half_split_order, rotary_heads
from serve_app.loaders.opening import stated_args
from serve_app.loaders.quantized import Source, Step, run_steps
from serve_app.loaders.quantized_as_stored import gguf_facts, sources_as_stored
from serve_app.loaders.quantized_plan import plan_steps, require_gguf_types
from serve_app.loaders.quantized_target import TokenizerForms, open_readable
from serve_app.loaders.recode import Progress
from serve_app.loaders.wanted import WantedTensor, wanted_tensors
from serve_app.models.decoder_args import DecoderArgs
from serve_app.models.registry import Family
from serve_app.quant.mix import Recipe

logger = logging.getLogger(__name__)

_QUANTISATION_VERSION = 2
# What goes together: where one of them is another, all of them are.
_REPLACED = ("tokenizer.ggml.", "tokenizer.chat_template")
_DROPPED = ("general.file_type", "general.quantization_version", "general.alignment")


class GgufTarget:
    """See Target: the model as a GGUF."""

    def __init__(self, files: ModelFiles, tokenizers: TokenizerForms) -> None:
        """LaunchError, with the reason, for a model that a GGUF cannot describe."""
        checkpoint = open_readable(files)
        if files.gguf_metadata is not None:
            self._sources, self._facts = sources_as_stored(files, list(checkpoint.stored()))
            rows = next((source.shape[0] for source in self._sources if source.name == "token_embd.weight"), 0)
            self._metadata = _with_tokenizer(_own_metadata(files), tokenizers.gguf_values(rows, None))
            return
        family, args = stated_args(files)
        assert isinstance(args, DecoderArgs)
        values = gguf_values(args, files.config_file) | {"general.type": "model", "general.name": files.model_name}
        values |= tokenizers.gguf_values(args.vocab_size, args.GGUF.pre_tokenizer)
        self._metadata = {key: encoded(value) for key, value in values.items()}
        self._sources = _sources_of_folder(files, family, args, checkpoint)
        self._facts = gguf_facts(values, any(source.name == "output.weight" for source in self._sources))

    def plan(self, recipe: Recipe) -> list[Step]:
        """See Target. LaunchError for a type that no GGUF holds."""
        require_gguf_types(recipe)
        return plan_steps(self._sources, recipe, self._facts, needs_gguf=True)

    def write(self, path: Path, recipe: Recipe, steps: Sequence[Step], progress: Progress) -> int:
        """See Target."""
        metadata = self._metadata | {"general.quantization_version": encoded(_QUANTISATION_VERSION)}
        if recipe.file_type is not None:
            metadata["general.file_type"] = encoded(recipe.file_type)
        writer = GgufWriter(path, metadata, [TensorPlan(step.name, step.form, step.source.shape) for step in steps])
        try:
            run_steps(steps, writer, progress)
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
        return path.stat().st_size


def _sources_of_folder(files: ModelFiles, family: Family, args: DecoderArgs, checkpoint: Checkpoint) -> list[Source]:
    wanted, unused = wanted_tensors(family, cast(Any, args), checkpoint)
    unused = [name for name in unused if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")]
    if unused:
        logger.warning("%s: left out, for the model does not use them: %s", files.folder, ", ".join(unused))
    own = [_own_source(files, name, values) for name, values in _rotary_divisors(args)]
    return [_source(tensor, args) for tensor in wanted] + own


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


def _own_metadata(files: ModelFiles) -> dict[str, bytes]:
    """That of the GGUF itself, as it is, but for what belongs to its file and its architecture's name."""
    metadata = files.gguf_metadata or {}
    if files.kind == "ggml":  # it was read into a GGUF's terms, arrays of numbers among them
        values = {"general.name": files.model_name, **metadata}
        return {k: encoded(v.tolist() if isinstance(v, np.ndarray) else v) for k, v in values.items()}
    with open_gguf(files.weight_files, with_texts=False) as file:
        raw, name = file.raw_metadata(), metadata["general.architecture"]
        if name != file.metadata["general.architecture"]:
            raw = renamed(raw, file.metadata["general.architecture"], name, encoded(name))
    return {k: value for k, value in raw.items() if k not in _DROPPED and not k.startswith("split.")}


def _with_tokenizer(metadata: dict[str, bytes], others: dict[str, Any]) -> dict[str, bytes]:
    """Other values in the place of its own."""
    gone = tuple(prefix for prefix in _REPLACED if any(key.startswith(prefix) for key in others))
    kept = {key: value for key, value in metadata.items() if not key.startswith(gone)}
    return kept | {key: encoded(value) for key, value in others.items()}
