"""The importance matrix of in-situ quantization: read from a file, or computed from a text."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.errors import ModelFileError
from serve_app.loaders.file_choice import TOKENIZER_FILES
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.opening import find_args
from serve_app.options import IsqOptions
from serve_app.quant.imatrix import Importance, read_imatrix

Calibrate = Callable[[ModelFiles, str], Importance]
"""Runs a model, unquantised, over a text. The engine does it, which is built upon this package."""

CHUNK_TOKENS = 512
"""A text's chunks, where nothing else is said and the model's context is not shorter."""

_CALIBRATION_VERSION = 1
"""Counted up where the same text gives another importance."""


def chunk_tokens(files: ModelFiles) -> int:
    """How many tokens of a text are read at a time. ModelFileError for a model that does not load."""
    _, args = find_args(files)
    return min(CHUNK_TOKENS, args.max_position_embeddings)


def importance_key(files: ModelFiles, options: IsqOptions) -> str:
    """What identifies the importance: the hash of its file; or of its text, of the tokenizer, and how long the chunks
    are. "" without one.

    ModelFileError for a file that cannot be read.
    """
    if options.imatrix is not None:
        return "imatrix " + _digest(Path(options.imatrix).expanduser())
    if options.calibration_file is not None:
        text = _digest(Path(options.calibration_file).expanduser())
        tokenizer = _tokenizer_digest(files.tokenizer_source)
        return f"calibration {_CALIBRATION_VERSION} {text} {tokenizer} {chunk_tokens(files)}"
    return ""


def read_importance(files: ModelFiles, options: IsqOptions, calibrate: Calibrate | None) -> Importance | None:
    """The importance that the options name; None without one.

    Of a text: the model is loaded as it is and reads it once, its memory is given back. ModelFileError for files that
    do not do.
    """
    if options.imatrix is not None:
        return read_imatrix(Path(options.imatrix).expanduser())
    if options.calibration_file is None:
        return None
    assert calibrate is not None, "nothing that could read the text"
    return calibrate(replace(files, isq=None), calibration_text(options.calibration_file))


def calibration_text(name: str) -> str:
    """The text of a calibration file; ModelFileError where it cannot be read or is empty."""
    path = Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFileError(f"{path}: the calibration file cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: the calibration file is no text in UTF-8") from error
    if not text.strip():
        raise ModelFileError(f"{path}: the calibration file is empty")
    return text


def _tokenizer_digest(source: Path | Mapping[str, Any]) -> str:
    """Of all that a text's tokens depend on: a folder's or file's tokenizer with its configs, or a GGUF's."""
    if isinstance(source, Path):
        beside = source if source.is_dir() else source.parent
        paths = {path for name in TOKENIZER_FILES if (path := beside / name).is_file()}
        if source.is_file():
            paths.add(source)
        return " ".join(_digest(path) for path in sorted(paths))
    found = hashlib.blake2b()
    for key in sorted(key for key in source if key.startswith("tokenizer.ggml.")):
        value = source[key]
        found.update(f"{key}={value.tolist() if isinstance(value, np.ndarray) else value}\n".encode(errors="replace"))
    return found.hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error
