"""Python's collector kept from looking while much that lasts is made."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Without looking for cycles meanwhile: among the modules of torch and the million objects of a vocabulary there is
    next to none, and each look walks them all."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
