"""The tokenizer and the chat template that quantised files get: the options', else the model's own."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from serve_app.errors import LaunchError
from serve_app.gguf_file import open_gguf
from serve_app.loaders.file_choice import TOKENIZER_FILES
from serve_app.loaders.model_files import ModelFiles
from serve_app.text.chat_template import ChatTemplate
from serve_app.text.gguf_tokenizer import tokenizer_values
from serve_app.text.template_files import (
    MORE_FOLDER,
    gguf_values,
    templates_of_folder,
    templates_of_gguf,
    templates_of_options,
    write_templates,
)
from serve_app.text.tokenizer_export import write_tokenizer
from serve_app.text.tokenizer_files import vocabulary_from_folder

_KEY = "tokenizer.ggml."
_VOCABULARIES = {"tokenizer.json", "tokenizer.model"}


class OwnTokenizer:
    """See TokenizerForms: of one model."""

    def __init__(self, files: ModelFiles) -> None:
        """ModelFileError for a chat template of an option that cannot be read or does not compile."""
        self._files = files
        self._given = templates_of_options(files.jinja_explicit, files.chat_template)
        if self._given is not None:
            ChatTemplate(self._given.sources, origin=self._given.origin)

    def gguf_values(self, vocab_size: int, pre_tokenizer: str | None) -> dict[str, Any]:
        """See TokenizerForms."""
        # What lies beside a GGUF comes before its own template, as when it is served.
        templates = self._given or templates_of_folder(self._files.folder)
        values = {} if templates is None else gguf_values(templates.sources)
        source = self._outside()
        if source is None:
            return values
        if source.suffix == ".gguf":
            return values | _stored_values(source, vocab_size)
        with TemporaryDirectory(prefix="sirocco-") as folder:
            if source.is_file():
                _copy(source, Path(folder))
                source = Path(folder)
            return values | tokenizer_values(source, self._files.config or {}, vocab_size, pre_tokenizer)

    def write_files(self, folder: Path) -> tuple[int | None, tuple[int, ...]] | None:
        """See TokenizerForms."""
        source, metadata = self._outside(), self._files.gguf_metadata or {}
        is_copied = self._files.config is not None and source == self._files.folder
        templates = self._given
        if templates is None and not is_copied:
            templates = templates_of_folder(self._files.folder) or templates_of_gguf(metadata)
        if templates is not None:
            # They would come before what is written now, or beside it.
            shutil.rmtree(folder / MORE_FOLDER, ignore_errors=True)
            write_templates(folder, templates.sources)
        if source is None:
            has_none = metadata.get(f"{_KEY}model", "none") == "none"
            return None if has_none else write_tokenizer(folder, metadata)
        if source.suffix == ".gguf":
            with open_gguf(source) as file:
                return write_tokenizer(folder, file.metadata)
        if is_copied:
            return None
        _copy(source, folder)
        vocabulary = vocabulary_from_folder(folder)
        return vocabulary.bos_id, vocabulary.eos_ids

    def _outside(self) -> Path | None:
        """Folder or file of the tokenizer; None where a GGUF's own metadata are all there is."""
        source, folder = self._files.tokenizer_source, self._files.folder
        if not isinstance(source, Path):
            return None
        is_bare = source == folder and not any((folder / name).is_file() for name in _VOCABULARIES)
        return None if is_bare and self._files.config is None else source


def _stored_values(source: Path, vocab_size: int) -> dict[str, Any]:
    """A GGUF's tokenizer as it is there. LaunchError where it has not a token for each row of the embedding."""
    with open_gguf(source) as file:
        found = {key: value for key, value in file.metadata.items() if key.startswith(_KEY)}
    count = len(found.get(f"{_KEY}tokens", ()))
    if count != vocab_size:
        raise LaunchError(f"{source}: has {count} tokens, but the model's embedding {vocab_size} rows.")
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}


def _copy(source: Path, folder: Path) -> None:
    """A tokenizer's folder or file (tokenizer.json or .model, of whatever name), and the configs beside it."""
    for name in TOKENIZER_FILES - (set() if source.is_dir() else _VOCABULARIES):
        beside = (source if source.is_dir() else source.parent) / name
        if beside.is_file():
            shutil.copy(beside, folder / name)
    if source.is_file():
        shutil.copy(source, folder / ("tokenizer.json" if source.suffix == ".json" else "tokenizer.model"))
