"""Mapped files as tensors, and giving their pages back once a tensor has been copied out of them."""

import mmap
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.errors import ModelFileError


def map_file(path: Path) -> NDArray[np.uint8]:
    """The whole file as read-only mapped bytes. Raises ModelFileError where it cannot be opened or is empty."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{path}: the file cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ModelFileError(f"{path}: the file is empty") from error
    return np.frombuffer(mapped, dtype=np.uint8)


def as_tensor(data: NDArray[np.uint8]) -> Tensor:
    """The same bytes as a tensor, uint8 and not copied; it must never be written."""
    with warnings.catch_warnings():
        # torch warns that it cannot mark a tensor read-only.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(data)


def drop_pages(data: NDArray[np.uint8]) -> None:
    """Lets the kernel take back the pages of a part of a mapped file: reading them again is allowed and slower.

    Without this, a tensor that was copied while loading counts twice in the process's resident memory. Does nothing
    for memory that is no file mapping.
    """
    _advise(data, mmap.MADV_DONTNEED)


def expect_pages(data: NDArray[np.uint8]) -> None:
    """Lets the kernel begin to read a part of a mapped file that is needed soon; does nothing for other memory."""
    _advise(data, mmap.MADV_WILLNEED)


def _advise(data: NDArray[np.uint8], advice: int) -> None:
    """For the whole pages within data."""
    mapped = _mapping_of(data)
    if mapped is None or data.nbytes == 0:
        return
    begin = data.ctypes.data - np.frombuffer(mapped, dtype=np.uint8).ctypes.data
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (begin + data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if 0 <= first < last <= len(mapped):
        mapped.madvise(advice, first, last - first)


def _mapping_of(data: object) -> mmap.mmap | None:
    """The read-only mapping that an array is a view of, if any."""
    while data is not None:
        if isinstance(data, mmap.mmap):
            # A private writable mapping would lose what was written to it.
            return data if memoryview(data).readonly else None
        data = data.obj if isinstance(data, memoryview) else getattr(data, "base", None)
    return None
