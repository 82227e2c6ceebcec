"""A quantised SafeTensors folder out of another one or of a GGUF, for every type that there is."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from serve_app.loaders.folder_of_gguf import gguf_sources, write_side_files
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.quantized import Step, TokenizerForms, plan_steps, run_steps, stored_tensors
from serve_app.loaders.quantized_as_stored import folder_facts, plan_as_stored
from serve_app.loaders.recode import Progress
from serve_app.loaders.safetensors_writer import SafetensorsSink
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import Recipe

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NOT_COPIED = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json")


def plan_folder(files: ModelFiles, recipe: Recipe, importance: Importance | None) -> list[Step]:
    """The steps from a folder, or a GGUF, to a folder; errors for a model that none can be made of."""
    stored = stored_tensors(files)
    if files.config is not None:
        return plan_as_stored(files, stored, recipe, importance)
    sources, args = gguf_sources(files)
    has_head = any(source.name == "lm_head.weight" for source in sources)
    return plan_steps(sources, recipe, folder_facts(args, has_head), importance, needs_gguf=False)


def write_folder(
    folder: Path, files: ModelFiles, steps: Sequence[Step], progress: Progress, tokenizers: TokenizerForms
) -> None:
    """Writes what a model's folder has besides weights, then those under their name, once they are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    if files.config is None:
        write_side_files(folder, files, tokenizers)
    else:
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
