"""The importance matrix of in-situ quantization: read from a file, or computed from a text."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from serve_app.errors import ModelFileError
from serve_app.loaders.model_files import ModelFiles
from serve_app.options import IsqOptions
from serve_app.quant.imatrix import Importance, read_imatrix

Calibrate = Callable[[ModelFiles, str], Importance]
"""Runs a model, unquantised, over a text. The engine does it, which is built upon this package."""

_CALIBRATION_VERSION = 1
"""Counted up where the same text gives another importance."""


def importance_key(options: IsqOptions) -> str:
    """What identifies the importance: the hash of its file or of its text, "" without one.

    ModelFileError for a file that cannot be read.
    """
    if options.imatrix is not None:
        return "imatrix " + _digest(options.imatrix)
    if options.calibration_file is not None:
        return f"calibration {_CALIBRATION_VERSION} " + _digest(options.calibration_file)
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


def _digest(name: str) -> str:
    path = Path(name).expanduser()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error
