"""Whether, and how, an engine's weights can be made anew in another type: files at hand, and memory."""

from dataclasses import replace
from pathlib import Path

import torch

from serve_app.engine.weight_switch import SwitchPlan
from serve_app.errors import Conflict, InvalidRequest
from serve_app.kv_cache.free_memory import free_memory_bytes
from serve_app.kv_cache.pool_size import gpu_memory
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.weight_bytes import weight_bytes
from serve_app.options import IsqOptions
from serve_app.quant.encode import ENCODERS
from serve_app.quant.mix import Recipe
from serve_app.quant.quant_type import MIXES

NONE = "none"
"""Stands for the types that the model's files have."""

MARGIN_BYTES = 64 << 20
"""What is left for requests while weights are made."""

Stamp = tuple[tuple[int, int], ...]


def type_name(isq: IsqOptions | None) -> str:
    """How a choice of types is called."""
    return NONE if isq is None or isq.type is None else Recipe.parse(isq.type, promotes=not isq.is_pure).name


def find_isq(wanted: str | int, given: IsqOptions | None) -> IsqOptions | None:
    """The options for a type by any of its names; all but the type are as given. None: as the files are.

    InvalidRequest, with the list of types, for a name that is none.
    """
    name = str(wanted).strip()
    if name.lower() == NONE:
        return None
    isq = replace(given or IsqOptions(), type=name)
    try:
        if not name:
            raise ValueError(name)
        return replace(isq, type=type_name(isq))
    except ValueError:
        raise InvalidRequest(
            f"isq_type {name[:40]!r} is not a type that weights can be quantised to. There are {', '.join(ENCODERS)}, "
            f"the mixes {', '.join(MIXES)}, the widths 2, 3, 4, 5, 6 and 8 in bits, and {NONE!r} for the types of the "
            "model's files.",
            param="isq_type",
        ) from None


def stamp(files: ModelFiles) -> Stamp:
    """Size and time of change of each weight file. OSError where one is gone."""
    stats = [Path(path).stat() for path in files.weight_files]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def make_plan(
    isq: IsqOptions | None,
    files: ModelFiles,
    seen: Stamp,
    current: IsqOptions | None,
    device: str,
    num_sharing: int = 1,
) -> SwitchPlan:
    """seen: of the files as the model in use was loaded from them; current: its types. num_sharing: see WeightSwitch.

    Raises Conflict where the files are gone or others, and where memory does not suffice, with the bytes.
    """
    name = type_name(isq)
    _check_source(files, seen)
    wanted, in_use = weight_bytes(files, isq), weight_bytes(files, current)
    calibration = _calibration_bytes(files, isq)
    needed = wanted.kept + wanted.working + MARGIN_BYTES
    free = free_bytes(device)
    each = "" if num_sharing == 1 else f" for each of {num_sharing} replicas"
    if gpu_memory(device) is None:
        free //= num_sharing
        # The text is read before, and what that took is given back.
        needed = max(needed, calibration + MARGIN_BYTES)
    elif calibration and calibration + MARGIN_BYTES > (host := free_memory_bytes() // num_sharing):
        raise Conflict(
            f"The calibration text is read on the CPU, which needs {calibration + MARGIN_BYTES} bytes; {host} bytes "
            f"are free there{each}."
        )
    most = free + in_use.kept
    if needed > most:
        raise Conflict(
            f"The weights as {name} need {needed} bytes while they are made; {free} bytes are free{each}, {most} would "
            "be without the weights in use."
        )
    return SwitchPlan(name, type_name(current), isq, needed > free, needed, free, wanted.source)


def _calibration_bytes(files: ModelFiles, isq: IsqOptions | None) -> int:
    """What reading a calibration text takes in host memory, 0 where none is read."""
    from serve_app.engine.calibration import memory_bytes

    return 0 if isq is None or isq.calibration_file is None else memory_bytes(files)


def free_bytes(device: str) -> int:
    """What can still be taken where weights are kept."""
    gpu = gpu_memory(device)
    if gpu is None:
        return free_memory_bytes()
    # What torch keeps for later is free, too.
    return gpu[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _check_source(files: ModelFiles, seen: Stamp) -> None:
    why = "Weights are always made anew from the model's files, since quantising twice loses quality"
    try:
        now = stamp(files)
    except OSError as error:
        raise Conflict(f"{why}, and {error.filename} cannot be read any more ({error.strerror}).") from None
    for path, old, new in zip(files.weight_files, seen, now, strict=True):
        if old != new:
            raise Conflict(f"{why}, and {path} has changed since it was loaded. Restart the server to serve it.")
