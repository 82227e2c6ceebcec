"""A quantised SafeTensors folder out of another one, for every type that there is."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from serve_app.errors import LaunchError
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.quantized import Step, run_steps, stored_tensors
from serve_app.loaders.quantized_as_stored import plan_as_stored
from serve_app.loaders.recode import Progress
from serve_app.loaders.safetensors_writer import SafetensorsSink
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import Recipe

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NOT_COPIED = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json")


def plan_folder(files: ModelFiles, recipe: Recipe, importance: Importance | None) -> list[Step]:
    """The steps from a folder to another; LaunchError where the source is no folder."""
    if files.config is None:
        raise LaunchError(
            f"{files.model_name}: a folder of SafeTensors is made of a model that is one, not of a GGUF; "
            "give -o a name that ends in .gguf."
        )
    return plan_as_stored(files, stored_tensors(files), recipe, importance)


def write_folder(folder: Path, files: ModelFiles, steps: Sequence[Step], progress: Progress) -> None:
    """Copies what the model's folder has besides weights, then writes those under their name, once they are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(files.folder.iterdir()):
        if path.is_file() and not path.name.endswith(_NOT_COPIED):
            shutil.copy(path, folder / path.name)
    part = folder / (_WEIGHTS + ".part")
    try:
        with part.open("wb") as file:
            run_steps(steps, SafetensorsSink(file, steps), progress)
        # One of an earlier model there would send readers to other weights.
        (folder / _INDEX).unlink(missing_ok=True)
        part.replace(folder / _WEIGHTS)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
