"""Which families could read files of an architecture that none of them has the name of."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from serve_app.errors import ModelFileError
from serve_app.loaders.architecture import config_as, metadata_as
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.headers import HeaderSource
from serve_app.loaders.model_files import ModelFiles
from serve_app.models.registry import family_names, find_family, gguf_architecture

OpenCheckpoint = Callable[[ModelFiles], Checkpoint]


def near_families(files: ModelFiles, open_checkpoint: OpenCheckpoint) -> list[str]:
    """The families, by the names of -a, that find all their tensors in the files and leave none of them over.

    Shapes must be those that the family's reading of the configuration asks for. Reads headers only.
    """
    return [name for name in family_names() if _fits(as_family(files, name), open_checkpoint)]


def suggestion(near: list[str]) -> str:
    """What to say of them; "" where there are none."""
    if not near:
        return ""
    others = f" (the same tensors have {', '.join(near[1:])})" if len(near) > 1 else ""
    return f". Its tensors are those of {near[0]}: try -a {near[0]}{others}"


def as_family(files: ModelFiles, name: str) -> ModelFiles:
    """The files as if they said the architecture."""
    if files.gguf_metadata is not None:
        return replace(files, gguf_metadata=metadata_as(files.gguf_metadata, name))
    return replace(files, config=config_as(files.config or {}, name))


def unused_tensors(checkpoint: Checkpoint, unused: list[str]) -> list[str]:
    """Those of the tensors that nothing read which a model that fits its files has no reason to have."""
    head = checkpoint.stored_name("lm_head.weight")  # a tied head is often stored all the same
    return [name for name in unused if name != head and not name.endswith("rotary_emb.inv_freq")]


def _fits(files: ModelFiles, open_checkpoint: OpenCheckpoint) -> bool:
    try:
        family = find_family(_name(files.gguf_metadata, files.architecture), files.config_file)
        if files.gguf_metadata is not None:
            args = family.args.from_gguf(files.gguf_metadata, files.config_file)
        else:
            args = family.args.from_hf(files.config or {}, files.config_file)
        checkpoint = open_checkpoint(files)
        source = HeaderSource(checkpoint)
        family.build(args, source)
    except ModelFileError:
        return False
    return not unused_tensors(checkpoint, source.unused())


def _name(metadata: Mapping[str, Any] | None, architecture: Any) -> Any:
    return architecture if metadata is None else gguf_architecture(metadata)
