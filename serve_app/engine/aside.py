"""Work beside a running engine, which must not feel it."""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from kernels.dispatch import work_alone

T = TypeVar("T")

NICENESS = 10
"""A tenth of a core is left to it where the engine could use all: enough to come to an end under full load."""


def run_aside(work: Callable[[], T]) -> T:
    """What work() returns or raises, from a thread of its own that gives way to others. Waits for it."""
    result: Future[T] = Future()

    def run() -> None:
        # Linux counts a thread as a process here; it could not be undone, so the thread ends with the work.
        me = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + NICENESS))
        work_alone()
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return result.result()
