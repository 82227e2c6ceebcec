"""A model's family with its arguments, and its files as a checkpoint: what comes before any weight is read."""

from dataclasses import replace
from typing import Any, cast

from serve_app.errors import ModelFileError
from serve_app.gguf_file import open_gguf
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.gguf import GgufCheckpoint
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.safetensors import SafetensorsCheckpoint
from serve_app.models.base import ModelArgs
from serve_app.models.registry import Family, find_family, gguf_architecture


def find_args(files: ModelFiles) -> tuple[Family, ModelArgs]:
    """The model's family and its arguments; ModelFileError for a configuration that does not do.

    The arguments have the context that is served: longrope's choice of a set follows it.
    """
    family = find_family(_architecture(files), files.config_file)
    if files.gguf_metadata is not None:
        args = family.args.from_gguf(files.gguf_metadata, files.config_file)
    else:
        args = family.args.from_hf(files.config or {}, files.config_file)
    served = min(args.max_position_embeddings, files.max_seq_len)
    return family, replace(cast(Any, args), max_position_embeddings=served)


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """The tensors of a model's files; ModelFileError for a bad file."""
    if files.kind == "plain":
        return SafetensorsCheckpoint(files.weight_files)
    # Never closed: the weights are views of its mapping, which ends with the last of them.
    return GgufCheckpoint(open_gguf(files.weight_files, with_texts=False))


def _architecture(files: ModelFiles) -> str:
    name = files.architecture if files.gguf_metadata is None else gguf_architecture(files.gguf_metadata)
    if not isinstance(name, str):
        key = "general.architecture" if files.kind == "gguf" else "architectures"
        raise ModelFileError(f"{files.config_file}: key {key!r} is missing or no text")
    return name
