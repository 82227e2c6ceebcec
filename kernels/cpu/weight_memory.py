"""Memory for packed matrices, made ready by a thread of its own before they are asked for. No torch: it is there first.

Clearing a gigabyte of pages takes the kernel a third of a second or more, as long as a good part of importing torch.
"""

import contextlib
import os
from collections.abc import Iterable


def prepare(matrices: Iterable[tuple[int, int, int]]) -> None:
    """matrices: (type id, rows, columns) of those that will be made, about in this order. Does nothing without the
    native module. One caller at a time."""
    if os.environ.get("SIROCCO_NATIVE") == "0":
        return
    try:
        from kernels.cpu import _native
    except ImportError:
        return
    sizes = []
    for type_id, rows, columns in matrices:
        with contextlib.suppress(ValueError):  # a type that is kept in another form
            sizes.append(_native.packed_bytes(type_id, rows, columns))
    _native.prepare_weight_memory(sizes)


def end() -> None:
    """Gives back what no matrix has taken. Does nothing without the native module."""
    with contextlib.suppress(ImportError):
        from kernels.cpu import _native

        _native.end_weight_preparation()
