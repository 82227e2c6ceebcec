"""Results of in-situ quantization, kept in a folder so that the next start maps them.

One SafeTensors file for each result, with all of the model's tensors under the names that its own files have. Its name
ends in a hash of everything that decides the bytes. It is written as NAME.part, under a lock that ends with the process
that holds it, and gets its name once it is on the disk.
"""

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kernels import dispatch
from serve_app.errors import ModelFileError
from serve_app.loaders.fingerprint import fingerprint
from serve_app.loaders.isq_progress import LoadProgress
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.quantized import Step, run_steps
from serve_app.loaders.safetensors import SafetensorsCheckpoint
from serve_app.loaders.safetensors_writer import SafetensorsSink

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Counted up where the file's form changes, or an encoder writes other bytes for the same weights."""

_PART = ".part"


def open_cached(
    folder: Path,
    files: ModelFiles,
    recipe: str,
    steps: Sequence[Step],
    identity: str,
    final_steps: Callable[[], list[Step]],
    listener: LoadProgress,
) -> tuple[SafetensorsCheckpoint, bool] | None:
    """The result, mapped, and whether it was there; made and kept where it was not. None, after a warning, where the
    folder cannot keep it.

    steps: the plan; final_steps: with the importance, which may take long to find. ModelFileError for weights that
    cannot be quantised.
    """
    key = _key(files, steps, identity)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", files.model_name)[-80:]
    path = folder / f"{name}-{recipe}-{key}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        found = _opened(path, steps)
        return _make(path, steps, final_steps, listener) if found is None else (found, True)
    except OSError as error:
        logger.warning("%s: nothing is kept for the next start (%s)", folder, error.strerror or error)
        return None


def _key(files: ModelFiles, steps: Sequence[Step], identity: str) -> str:
    """A hash of the source files, of what becomes of their tensors, and of who does it.

    Of each source file: size, time of its last change, and of each tensor name, type, shape and eight samples. Reading
    whole files would take as long as quantising them.
    """
    stats = [path.stat() for path in files.weight_files]
    facts = {
        "version": FORMAT_VERSION,
        "files": [[stat.st_size, stat.st_mtime_ns] for stat in stats],
        "plan": identity,
        "encoders": "torch" if dispatch.native().ops is None else "native",
    }
    # Once more hashed: equal sources have equal keys and values in the prefix cache, which this is not about.
    stored = [part for step in steps for part in step.source.parts]
    return hashlib.blake2b(fingerprint(facts, stored), digest_size=16).hexdigest()


def _opened(path: Path, steps: Sequence[Step]) -> SafetensorsCheckpoint | None:
    """A result, if there is one; a damaged one is removed, with a warning."""
    if not path.exists():
        return None
    try:
        done = SafetensorsCheckpoint([path])
        for step in steps:
            found = done.find(step.name)
            if found is None or found.form.name != step.form.name or found.shape != step.source.shape:
                raise ModelFileError(f"{path}: tensor {step.name!r} is missing, or another than it should be")
    except ModelFileError as error:
        logger.warning("a kept result is damaged and made anew: %s", error)
        path.unlink(missing_ok=True)
        return None
    logger.info("%s: mapped", path)
    return done


def _make(
    path: Path,
    steps: Sequence[Step],
    final_steps: Callable[[], list[Step]],
    listener: LoadProgress,
) -> tuple[SafetensorsCheckpoint, bool] | None:
    with _part_of(path) as file:
        # Another process may have made it while this one waited for the lock.
        if (found := _opened(path, steps)) is not None:
            return found, True
        final = final_steps()
        file.truncate(0)  # what a process that is dead has left
        listener.start(path.name.rsplit("-", 1)[0], sum(step.source.num_bytes for step in final))
        try:
            run_steps(final, SafetensorsSink(file, final), listener.advance)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        finally:
            listener.finish()
        _sync_folder(path.parent)
    made = _opened(path, steps)
    return None if made is None else (made, False)


@contextmanager
def _part_of(path: Path) -> Iterator[BinaryIO]:
    """path's file under its temporary name, held by this process alone; waits for another one that holds it."""
    part = path.with_name(path.name + _PART)
    while True:
        with part.open("a+b") as file:
            if not _lock(file, waits=False):
                logger.info("%s: another process writes it, waiting", path)
                _lock(file, waits=True)
            if not _is_named(file, part):
                continue
            try:
                yield file
            finally:
                # Still there where nothing came of it.
                if _is_named(file, part):
                    part.unlink()
            return


def _remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files of processes that are dead: nobody holds their locks."""
    for part in folder.glob(f"*.safetensors{_PART}"):
        try:
            with part.open("r+b") as file:
                if _lock(file, waits=False) and _is_named(file, part):
                    part.unlink()
                    logger.info("%s: removed, its writer has ended before it was whole", part)
        except FileNotFoundError:
            continue


def _lock(file: BinaryIO, *, waits: bool) -> bool:
    """False where another process has it and this one does not wait. The lock ends with the open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_named(file: BinaryIO, path: Path) -> bool:
    """Whether the open file still has the name: it may have got another, or been removed, before it was locked."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    opened = os.fstat(file.fileno())
    return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk too."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
