"""Where the bytes of a KV pool lie: one mapping that other processes of this node can share."""

import contextlib
import fcntl
import mmap
import os
from typing import Protocol


class Arena(Protocol):
    """A block of zeroed memory. The one who created it and those who attached to its handle see the same bytes."""

    @property
    def num_bytes(self) -> int:
        """Its size."""

    @property
    def handle(self) -> int:
        """What attach takes in another process: here a file descriptor, to be passed over SCM_RIGHTS."""

    def buffer(self) -> memoryview:
        """The bytes, writable unless attached read-only. The memory stays mapped as long as any view of it lives."""

    def close(self) -> None:
        """Lets go of it; the memory is freed when the last process and the last view have."""


class PosixShmArena:
    """An Arena of anonymous shared memory (a sealed memfd): not limited by the size of /dev/shm, gone with its users.

    Never multiprocessing.shared_memory: on Python 3.11 and 3.12 the death of an attached reader unlinks the segment.
    """

    def __init__(self, fd: int, num_bytes: int, *, readonly: bool = False) -> None:
        """Maps num_bytes of fd and owns fd from then on. Use create() and attach()."""
        self.num_bytes = num_bytes
        self._fd = fd
        protection = mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE
        self._map: mmap.mmap | None = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=protection)

    @classmethod
    def create(cls, num_bytes: int) -> "PosixShmArena":
        """num_bytes of zeros; pages are taken when they are first touched."""
        fd = os.memfd_create("sirocco-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            # A peer that shrank the file would end the others with SIGBUS.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, num_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, handle: int, *, readonly: bool = False) -> "PosixShmArena":
        """Maps an arena that another process created; handle is duplicated, the caller keeps its own."""
        fd = os.dup(handle)
        try:
            return cls(fd, os.fstat(fd).st_size, readonly=readonly)
        except BaseException:
            os.close(fd)
            raise

    @property
    def handle(self) -> int:
        assert self._map is not None, "the arena is closed"
        return self._fd

    def buffer(self) -> memoryview:
        assert self._map is not None, "the arena is closed"
        return memoryview(self._map)

    def close(self) -> None:
        if self._map is None:
            return
        os.close(self._fd)
        # With views alive the mapping must stay; it goes with the last of them.
        with contextlib.suppress(BufferError):
            self._map.close()
        self._map = None
