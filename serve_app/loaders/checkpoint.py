"""What a model's files hold, whichever format they are in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.formats import BlockFormat


@dataclass(frozen=True, slots=True)
class Recoding:
    """source: the type of the bytes in the file, which become those of another one while they are loaded.

    importance: float32 [columns], or [experts * columns]: how much errors count; None where all columns count alike.
    shift: what is added to each number.
    """

    source: BlockFormat
    importance: Tensor | None = None
    shift: float = 0.0

    def of_expert(self, number: int, columns: int) -> "Recoding":
        """That of one of the matrices that lie one below the other in a tensor."""
        if self.importance is None or len(self.importance) == columns:
            return self
        return replace(self, importance=self.importance[number * columns : (number + 1) * columns])


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in its file: data is mapped, one-dimensional and read-only; shape outermost first.

    name and file are those that an error message shows. row_order [shape[0]] int64: where rows must be gathered from
    to come in the order that the Hugging Face checkpoint has, None where they do already. recoding: what data really
    holds where it is not of `form` yet (loaders.recode makes it so).
    """

    file: str
    name: str
    form: BlockFormat
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    row_order: Tensor | None = None
    recoding: Recoding | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that it has in its form, which are those of the file where nothing is recoded."""
        if self.recoding is None:
            return int(self.data.size)
        return num_elements(self.shape) // self.form.block_length * self.form.block_bytes


class Checkpoint(Protocol):
    """The tensors of one model's files."""

    @property
    def label(self) -> str:
        """The file, or the first of several, as errors name it."""
        ...

    def find(self, name: str) -> StoredTensor | None:
        """The tensor of a Hugging Face checkpoint's name; None where the files do not hold it."""
        ...

    def stored_name(self, name: str) -> str:
        """What the file calls, or would call, that tensor."""
        ...

    def stored(self) -> Iterator[StoredTensor]:
        """All tensors in the order of their stored names, row_order left out."""
        ...


def num_elements(shape: Sequence[int]) -> int:
    """The product of the dimensions."""
    total = 1
    for dim in shape:
        total *= dim
    return total


def num_bytes(form: BlockFormat, shape: Sequence[int]) -> int:
    """Bytes of a tensor of that type; a number by itself is a row of one. ValueError for rows of no whole blocks."""
    rows, columns = (shape[:-1], shape[-1]) if shape else ((), 1)
    return num_elements(rows) * form.row_bytes(columns)
