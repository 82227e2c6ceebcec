"""What the sampler remembers of each row over the vocabulary, in tables that exist only once something needs them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serve_app.options import SamplingParams


class RowTable:
    """A table [max_rows, vocab_size] of one dtype, zero at first, allocated at its first use.

    On the CPU its pages come from the system when they are written, so rows that never use it take no memory.
    """

    def __init__(self, max_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (max_rows, vocab_size)
        self._dtype = dtype
        self._device = device
        self._data: Tensor | None = None

    @property
    def data(self) -> Tensor:
        """The table."""
        if self._data is None:
            if self._device.type == "cpu":
                numpy_dtype = torch.empty(0, dtype=self._dtype).numpy().dtype
                self._data = torch.from_numpy(np.zeros(self._shape, numpy_dtype))
            else:
                self._data = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        return self._data

    def write(self, row: int, ids: Sequence[int], values: Sequence[float] | int) -> None:
        """Makes the row zero but for the given ids."""
        table = self.data
        table[row].zero_()
        if len(ids):
            index = torch.tensor(ids, dtype=torch.int64, device=self._device)
            filled = torch.as_tensor(values, dtype=self._dtype, device=self._device).expand(len(ids))
            table[row].index_put_((index,), filled, accumulate=self._dtype != torch.bool)

    def copy(self, src: int, dst: int) -> None:
        """Makes row dst a copy of row src."""
        if self._data is not None:
            self._data[dst].copy_(self._data[src])


class PenaltyTables:
    """Which tokens a row's prompt holds and how often each was put out: for the three OpenAI-style penalties."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._counts = RowTable(max_rows, vocab_size, torch.int32, device)
        self._in_prompt = RowTable(max_rows, vocab_size, torch.bool, device)

    def set_row(self, row: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Starts the row's counts."""
        self._in_prompt.write(row, prompt_ids, 1)
        self._counts.write(row, output_ids, 1)

    def copy_row(self, src: int, dst: int) -> None:
        """For a fork."""
        self._counts.copy(src, dst)
        self._in_prompt.copy(src, dst)

    def add(self, rows: Tensor, token_ids: Tensor) -> None:
        """Counts one drawn token of each row."""
        counts = self._counts.data
        counts.index_put_((rows, token_ids), counts.new_ones(()), accumulate=True)

    def apply(self, logits: Tensor, rows: Tensor, parameters: Tensor) -> Tensor:
        """logits [s, vocab] of the given rows [s], parameters [s, 3] (presence, frequency, repetition) → logits.

        presence and frequency count output tokens; repetition scales those of the prompt too: logits above zero are
        divided by it, others multiplied.
        """
        presence, frequency, repetition = parameters[:, :1], parameters[:, 1:2], parameters[:, 2:]
        counts = self._counts.data.index_select(0, rows)
        is_used = counts > 0
        logits = logits - frequency * counts - presence * is_used
        is_seen = is_used | self._in_prompt.data.index_select(0, rows)
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        return torch.where(is_seen, scaled, logits)


def needs_penalties(params: SamplingParams) -> bool:
    """Whether any of the three is on."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1
