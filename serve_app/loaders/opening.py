"""A model's family with its arguments, and its files as a checkpoint: what comes before any weight is read."""

from dataclasses import replace
from typing import Any, cast

from serve_app.errors import ModelFileError
from serve_app.ggml_file import open_ggml
from serve_app.gguf_file import open_gguf
from serve_app.layers.rope_scaling import RopeScaling
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.gguf import GgufCheckpoint
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.near_families import near_families, suggestion
from serve_app.loaders.safetensors import SafetensorsCheckpoint
from serve_app.models.base import ModelArgs
from serve_app.models.decoder_args import DecoderArgs
from serve_app.models.registry import Family, UnknownArchitecture, find_family, gguf_architecture


def find_args(files: ModelFiles) -> tuple[Family, ModelArgs]:
    """The model's family and its arguments; ModelFileError for a configuration that does not do.

    The arguments have the context that is served: with it go the size of rotary tables and, where it stays within the
    original length, the only set of longrope that is needed.
    """
    family, args = stated_args(files)
    longest = args.max_position_embeddings
    scaling = args.rope.scaling if isinstance(args, DecoderArgs) else RopeScaling()
    if scaling.kind == "dynamic":
        # The base grows with the text, so that it may be as much longer than the configuration says.
        longest = int(scaling.factor * scaling.original_max_position_embeddings)
    return family, replace(cast(Any, args), max_position_embeddings=min(longest, files.max_seq_len))


def stated_args(files: ModelFiles) -> tuple[Family, ModelArgs]:
    """The model's family, and its arguments as the files have them; ModelFileError as for find_args."""
    try:
        family = find_family(_architecture(files), files.config_file)
    except UnknownArchitecture as error:
        near = suggestion(near_families(files, open_checkpoint))
        raise UnknownArchitecture(f"{error}{near}") from None
    if files.gguf_metadata is not None:
        return family, family.args.from_gguf(files.gguf_metadata, files.config_file)
    return family, family.args.from_hf(files.config or {}, files.config_file)


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """The tensors of a model's files; ModelFileError for a bad file."""
    if files.kind == "plain":
        return SafetensorsCheckpoint(files.weight_files)
    # Never closed: the weights are views of its mapping, which ends with the last of them.
    file = open_ggml(files.weight_files[0]) if files.kind == "ggml" else open_gguf(files.weight_files, with_texts=False)
    return GgufCheckpoint(file, files.gguf_metadata)


def _architecture(files: ModelFiles) -> str:
    name = files.architecture if files.gguf_metadata is None else gguf_architecture(files.gguf_metadata)
    if not isinstance(name, str):
        key = "general.architecture" if files.kind == "gguf" else "architectures"
        raise ModelFileError(f"{files.config_file}: key {key!r} is missing or no text")
    return name
