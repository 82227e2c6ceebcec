"""Rotary position embedding: the table of angles that queries and keys are turned by."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Rotary:
    """Angles of queries and keys of all layers that share them; the table grows with the longest context seen."""

    def __init__(self, frequencies: Tensor, max_positions: int, magnitude: float = 1.0) -> None:
        """frequencies [rotary_dim / 2] float32 on the model's device; max_positions: of the model. magnitude: what
        cosines and sines are multiplied with."""
        self._magnitude = np.float32(magnitude)
        self._device = frequencies.device
        # A model built from its files' headers alone, to check them, has no numbers.
        held = torch.ones(len(frequencies)) if frequencies.is_meta else frequencies.cpu()
        self._frequencies: NDArray[np.float32] = held.numpy()
        self._max_positions = max_positions
        self._host: NDArray[np.float32] = self._make(0)
        self._table = torch.empty(0)

    @property
    def rotary_dim(self) -> int:
        """See AngleTable."""
        return 2 * len(self._frequencies)

    def covering(self, num_positions: int) -> NDArray[np.float32]:
        """See AngleTable. Without torch: native steps run no operator of it."""
        if num_positions > len(self._host):
            self._host = self._make(max(num_positions, min(self._max_positions, max(512, 2 * num_positions))))
        return self._host

    def on_device(self, num_positions: int) -> Tensor:
        """See AngleTable."""
        host = self.covering(num_positions)
        if len(self._table) != len(host):
            self._table = torch.from_numpy(host).to(self._device)
        return self._table

    def _make(self, num_positions: int) -> NDArray[np.float32]:
        angles = np.arange(num_positions, dtype=np.float32)[:, None] * self._frequencies
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * self._magnitude
