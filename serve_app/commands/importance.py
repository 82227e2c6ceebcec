"""Where the commands take an importance matrix from: a file, or a text that the model reads first."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from serve_app.commands.progress import steps_bar
from serve_app.errors import LaunchError

if TYPE_CHECKING:
    from serve_app.engine.calibration import Calibration
    from serve_app.loaders.model_files import ModelFiles
    from serve_app.quant.imatrix import Importance


def check_options(imatrix: str | None, calibration_file: str | None, save: str | None = None) -> None:
    """LaunchError for options that contradict each other, before any work is done."""
    from serve_app.loaders.saved_imatrix import check_imatrix_name

    if imatrix and calibration_file:
        raise LaunchError(
            "The options --imatrix and --calibration-file both give the importance of columns: choose one."
        )
    if save and not calibration_file:
        raise LaunchError("The option --save-imatrix keeps what --calibration-file computes: give that too.")
    if save:
        check_imatrix_name(Path(save).expanduser())


def find_importance(
    files: "ModelFiles",
    imatrix: str | None,
    calibration_file: str | None,
    save: str | None = None,
    chunk_tokens: int | None = None,
) -> "Importance | None":
    """The importance matrix that the options ask for, None without them; a computed one is saved if wanted.

    chunk_tokens: see engine.calibration.
    """
    from serve_app.loaders.saved_imatrix import save_imatrix
    from serve_app.quant.imatrix import read_imatrix

    if imatrix:
        return read_imatrix(Path(imatrix).expanduser())
    if not calibration_file:
        return None
    text = Path(calibration_file).expanduser()
    made = _calibrated(files, read_text(text, "--calibration-file"), chunk_tokens)
    if save:
        target = Path(save).expanduser()
        try:
            save_imatrix(
                target, made.importance, made.counts,
                num_chunks=made.num_chunks, chunk_tokens=made.chunk_tokens, dataset=text.name,
            )  # fmt: skip
        except OSError as error:
            raise LaunchError(f"{target}: cannot be written ({error.strerror or error}).") from error
    return made.importance


def read_text(path: Path, option: str) -> str:
    """A text file; LaunchError naming the option where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"The option {option}: {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise LaunchError(f"The option {option}: {path} is no text in UTF-8 (byte {error.start}).") from error


def _calibrated(files: "ModelFiles", text: str, chunk_tokens: int | None) -> "Calibration":
    from serve_app.engine.calibration import measure_inputs

    started = time.monotonic()
    with steps_bar(Console(stderr=True)) as bar:
        task = bar.add_task("importance matrix", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        made = measure_inputs(files, text, chunk_tokens=chunk_tokens, progress=progress)
    tokens, seconds = made.num_chunks * made.chunk_tokens, time.monotonic() - started
    print(f"importance matrix: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s")
    return made
