"""A model's logits over the chunks of a text, for all that are compared with it: computed once, kept in a file."""

import os
from collections.abc import Sequence
from typing import BinaryIO

import torch
from torch import Tensor

from serve_app.engine.llm import LLM

_LEAST_FREE_BYTES = 1 << 30
"""What is left to others where the file lies."""


class ReferenceLogits:
    """The scored half of each chunk; one chunk's are in memory at a time."""

    def __init__(self, llm: LLM, chunks: Sequence[Sequence[int]], file: BinaryIO | None = None) -> None:
        """chunks: of one length. file: empty, open for reading and writing; what does not fit beside the bytes that
        are left free, or without a file all, is computed each time. So it is on a GPU, which is quicker than a disk."""
        self.chunks = chunks
        self._llm = llm
        self._file = file
        self._num_kept = 0
        self._columns = 0

    def __call__(self, number: int) -> Tensor:
        """See scored_logits: of the chunk of that number."""
        if number < self._num_kept:
            return self._read(number)
        found = scored_logits(self._llm, self.chunks[number])
        if number == self._num_kept and found.device.type == "cpu":
            self._keep(found.contiguous())
        return found

    def _keep(self, found: Tensor) -> None:
        if self._file is None:
            return
        try:
            left = os.fstatvfs(self._file.fileno())
            if left.f_bavail * left.f_frsize < found.nbytes + _LEAST_FREE_BYTES:
                return
            self._file.seek(self._num_kept * found.nbytes)
            self._file.write(found.numpy().data)
            self._file.flush()
        except OSError:  # a quota, say: it is computed again instead
            self._file = None
            return
        self._num_kept, self._columns = self._num_kept + 1, found.shape[1]

    def _read(self, number: int) -> Tensor:
        assert self._file is not None
        found = torch.empty(len(self.chunks[0]) - 1 - len(self.chunks[0]) // 2, self._columns)
        self._file.seek(number * found.nbytes)
        self._file.readinto(found.numpy())  # type: ignore[attr-defined]
        return found


def scored_logits(llm: LLM, chunk: Sequence[int]) -> Tensor:
    """float32 [tokens that are scored, vocabulary]: those that predict tokens chunk / 2 + 1 and after."""
    # The last token is only predicted; the logits that follow it predict nothing that is known.
    return llm.logits(chunk[:-1])[len(chunk) // 2 :]
