"""What makes a folder that we load out of a GGUF: sources by a checkpoint's names, config.json, the tokenizer's files.

The experts of a layer stay one tensor, and Llama 3's rotary divisors one of their own: it is for us alone to read.
"""

import json
import shutil
from pathlib import Path
from typing import Any, cast

from serve_app.errors import LaunchError
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.hf_config import hf_config
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.name_map import gguf_name
from serve_app.loaders.opening import open_checkpoint, stated_args
from serve_app.loaders.quantized import Source, TokenizerForms
from serve_app.loaders.wanted import wanted_tensors
from serve_app.models.decoder_args import DecoderArgs


def gguf_sources(files: ModelFiles) -> tuple[list[Source], DecoderArgs]:
    """The model's tensors, and its arguments as the folder will state them.

    LaunchError or ModelFileError for a file with tensors that the folder's model would not use: they would be lost.
    """
    config, checkpoint = _config(files)
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


def write_side_files(folder: Path, files: ModelFiles, tokenizers: TokenizerForms) -> None:
    """config.json, and the tokenizer's files where the GGUF has a tokenizer; generation_config.json from beside it."""
    config, _ = _config(files)
    metadata = files.gguf_metadata or {}
    if metadata.get("tokenizer.ggml.model", "none") != "none":
        bos_id, eos_ids = tokenizers.write_files(folder, metadata)
        config |= {"bos_token_id": bos_id, "eos_token_id": list(eos_ids)}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    beside = files.folder / "generation_config.json"
    if beside.is_file():
        shutil.copy(beside, folder / beside.name)


def _config(files: ModelFiles) -> tuple[dict[str, Any], Checkpoint]:
    family, args = stated_args(files)
    assert isinstance(args, DecoderArgs)
    checkpoint = open_checkpoint(files)
    return hf_config(family, args, checkpoint), checkpoint
