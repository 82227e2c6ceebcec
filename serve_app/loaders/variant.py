"""A model's files in another type, for as long as they are looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.quantized_folder import plan_folder, write_folder
from serve_app.loaders.quantized_gguf import plan_gguf, write_gguf
from serve_app.options import IsqOptions
from serve_app.quant.imatrix import read_imatrix
from serve_app.quant.mix import Recipe


@contextmanager
def quantised(files: ModelFiles, isq: IsqOptions) -> Iterator[ModelFiles]:
    """The model with its weights as isq says, in files of their own, which go away at the end.

    LaunchError or ModelFileError for a type that the files cannot be brought into.
    """
    assert isq.type is not None
    recipe = Recipe.parse(isq.type, promotes=not isq.is_pure)
    importance = None if isq.imatrix is None else read_imatrix(Path(isq.imatrix))
    with TemporaryDirectory(prefix="sirocco-") as folder:
        if files.kind == "gguf":
            target = Path(folder) / "model.gguf"
            write_gguf(target, files, recipe, plan_gguf(files, recipe, importance), lambda name, num_bytes: None)
        else:
            write_folder(Path(folder), files, plan_folder(files, recipe, importance), lambda name, num_bytes: None)
            target = Path(folder) / "model.safetensors"
        yield replace(files, weight_files=(target,))


def can_become(files: ModelFiles, recipe: Recipe) -> bool:
    """Whether the files' container holds the type."""
    return files.kind == "plain" or recipe.base.is_gguf
