"""A quantised SafeTensors folder out of another one or of a GGUF, for every type that there is."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from serve_app.loaders.file_choice import SIDE_FOLDER, TOKENIZER_FILES
from serve_app.loaders.folder_of_gguf import gguf_config, gguf_sources
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.quantized import Step, run_steps
from serve_app.loaders.quantized_as_stored import folder_facts, sources_as_stored
from serve_app.loaders.quantized_plan import plan_steps
from serve_app.loaders.quantized_target import TokenizerForms, open_readable
from serve_app.loaders.recode import Progress
from serve_app.loaders.safetensors_writer import SafetensorsSink
from serve_app.quant.mix import Recipe

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NOT_COPIED = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json")


class FolderTarget:
    """See Target: the model as a folder."""

    def __init__(self, files: ModelFiles, tokenizers: TokenizerForms) -> None:
        """Errors for a model that none can be made of."""
        checkpoint = open_readable(files)
        self._files, self._tokenizers = files, tokenizers
        if files.config is not None:
            self._config = files.config
            self._sources, self._facts = sources_as_stored(files, list(checkpoint.stored()))
        else:
            self._config = gguf_config(files, checkpoint)
            self._sources, args = gguf_sources(files, checkpoint, self._config)
            self._facts = folder_facts(args, any(source.name == "lm_head.weight" for source in self._sources))

    def plan(self, recipe: Recipe) -> list[Step]:
        """See Target."""
        return plan_steps(self._sources, recipe, self._facts, needs_gguf=False)

    def write(self, path: Path, recipe: Recipe, steps: Sequence[Step], progress: Progress) -> int:
        """See Target: first what a model's folder has besides weights."""
        path.mkdir(parents=True, exist_ok=True)
        self._write_side_files(path)
        part = path / (_WEIGHTS + ".part")
        try:
            with part.open("wb") as file:
                run_steps(steps, SafetensorsSink(file, steps), progress)
                size = file.tell()
            # One of an earlier model there would send readers to other weights.
            (path / _INDEX).unlink(missing_ok=True)
            part.replace(path / _WEIGHTS)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return size

    def _write_side_files(self, folder: Path) -> None:
        files = self._files
        if files.config is not None:
            self._copy_side_files(folder)
        elif (beside := files.folder / "generation_config.json").is_file():
            shutil.copy(beside, folder / beside.name)
        ids = self._tokenizers.write_files(folder)
        config = self._config
        if ids is not None and files.config is None:
            config = config | {"bos_token_id": ids[0], "eos_token_id": list(ids[1])}
        # Also where it was one before: an option may have named another architecture.
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def _copy_side_files(self, folder: Path) -> None:
        source = self._files.folder
        has_own = self._files.tokenizer_source == source
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(_NOT_COPIED) and (has_own or path.name not in TOKENIZER_FILES):
                shutil.copy(path, folder / path.name)
        if (source / SIDE_FOLDER).is_dir():
            shutil.copytree(source / SIDE_FOLDER, folder / SIDE_FOLDER, dirs_exist_ok=True)
