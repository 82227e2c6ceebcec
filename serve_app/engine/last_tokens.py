"""The token that each row drew last, on the device: the next step reads it there before the host has heard of it."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.reference.sampling import without_waiting


class LastTokens:
    """One token id for each row of the engine."""

    def __init__(self, max_rows: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._ids = torch.zeros(max_rows, dtype=torch.int64, device=self._device)

    def keep(self, rows: NDArray[np.int64], token_ids: Tensor) -> None:
        """Remembers what the rows [S] have drawn, token_ids [S] int64 on the device. Nothing is waited for."""
        self._ids.index_copy_(0, without_waiting(torch.from_numpy(rows), self._device), token_ids)

    def resolve(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 on the device with the ids in place of UNKNOWN - row; see engine.request."""
        return torch.where(token_ids < 0, self._ids[(-1 - token_ids).clamp_(min=0)], token_ids)
