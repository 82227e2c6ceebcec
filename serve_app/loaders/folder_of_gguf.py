"""What makes a folder that we load out of a GGUF: config.json, and sources by a checkpoint's names.

The experts of a layer stay one tensor, and Llama 3's rotary divisors one of their own: it is for us alone to read.
"""

from typing import Any, cast

from serve_app.errors import LaunchError
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.hf_config import hf_config
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.name_map import gguf_name
from serve_app.loaders.opening import stated_args
from serve_app.loaders.quantized import Source
from serve_app.loaders.wanted import wanted_tensors
from serve_app.models.decoder_args import DecoderArgs


def gguf_config(files: ModelFiles, checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json of the folder; see hf_config."""
    family, args = stated_args(files)
    assert isinstance(args, DecoderArgs)
    return hf_config(family, args, checkpoint)


def gguf_sources(files: ModelFiles, checkpoint: Checkpoint, config: dict[str, Any]) -> tuple[list[Source], DecoderArgs]:
    """The model's tensors, and its arguments as the folder will state them in its config.

    LaunchError or ModelFileError for a file with tensors that the folder's model would not use: they would be lost.
    """
    family, stated = stated_args(files)
    args = cast(Any, family.args).from_hf(config, files.config_file)
    assert isinstance(args, DecoderArgs)
    wanted, unused = wanted_tensors(family, cast(Any, args), checkpoint)
    unused = [name for name in unused if not name.startswith("rope_factors_")]  # these are in the config
    if unused:
        raise LaunchError(f"{files.config_file}: no model in a folder uses its tensors {', '.join(unused[:5])}.")
    shift = getattr(stated, "norm_offset", 0.0) - getattr(args, "norm_offset", 0.0)
    return [
        Source(
            tensor.name,
            gguf_name(tensor.name, args.GGUF.architecture),
            tensor.parts,
            tensor.shape,
            shift if tensor.name.endswith("norm.weight") else 0.0,
        )
        for tensor in wanted
    ], args
