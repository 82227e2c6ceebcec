"""Rotary position embedding: the table of angles that queries and keys are turned by."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.reference.sampling import without_waiting
from serve_app.layers.angle_sets import AngleSets, OneSet, SetsByLength, TwoSets

NUM_PLACES = 16
"""Lengths beyond the original one that a model with dynamic scaling serves at a time; requests of others wait."""

Rows = NDArray[np.float32]


class Rotary:
    """Angles of queries and keys of all layers that share them; the table grows with the longest context seen.

    sets: the rows that a request uses. rows_ahead: those in front of the set that grows.
    """

    def __init__(
        self, frequencies: Tensor, max_positions: int, magnitude: float = 1.0, *, short: "Rotary | None" = None
    ) -> None:
        """frequencies [rotary_dim / 2] float32 on the model's device; max_positions: of the model. magnitude: what
        cosines and sines are multiplied with. short: angles of requests within its max_positions, which then are the
        table's first rows."""
        self._magnitude = magnitude
        self._device = frequencies.device
        # A model built from its files' headers alone, to check them, has no numbers.
        held = torch.ones(len(frequencies)) if frequencies.is_meta else frequencies.cpu()
        self._frequencies: Rows = held.numpy()
        self._max_positions = max_positions
        self._short = short
        self.rows_ahead = 0 if short is None else short._max_positions
        self.sets: AngleSets = OneSet() if short is None else TwoSets(self.rows_ahead)
        self._host: Rows = np.empty((0, self.rotary_dim), np.float32)
        self._table = torch.empty(0)

    @property
    def rotary_dim(self) -> int:
        """See AngleTable."""
        return 2 * len(self._frequencies)

    def covering(self, num_positions: int) -> Rows:
        """See AngleTable. Without torch: native steps run no operator of it."""
        if self.rows_ahead + num_positions > len(self._host):
            self._host = _angles(self._most_rows(num_positions), self._frequencies, self._magnitude)
            if self._short is not None:
                ahead = _angles(self.rows_ahead, self._short._frequencies, self._short._magnitude)
                self._host = np.concatenate([ahead, self._host])
        return self._host

    def on_device(self, num_positions: int) -> Tensor:
        """See AngleTable."""
        host = self.covering(num_positions)
        if len(self._table) != len(host):
            self._table = torch.from_numpy(host).to(self._device)
        return self._table

    def num_bytes(self, num_positions: int) -> int:
        """See AngleTable."""
        return 4 * self.rotary_dim * (self.rows_ahead + self._most_rows(num_positions))

    def _most_rows(self, num_positions: int) -> int:
        """Of the set that grows, once so many are asked for: some more, so that it rarely does."""
        return max(num_positions, min(self._max_positions, max(512, 2 * num_positions)))


class PlacedRotary:
    """Angles whose frequencies follow a request's length beyond the original one: see SetsByLength.

    The table has its full size from the first use on, so that its address can be kept; memory that nothing is written
    to is not taken on a CPU. rows_ahead: 0, any position of a set is covered.
    """

    rows_ahead = 0

    def __init__(
        self, frequencies: Callable[[int], Tensor], original: int, max_positions: int, device: torch.device
    ) -> None:
        """frequencies(length): float32 [rotary_dim / 2] of requests of so many tokens, on the CPU. original: tokens up
        to which they are the same. max_positions: of the longest request, beyond original."""
        self._frequencies = frequencies
        self._original = original
        self._num_rows = original + NUM_PLACES * max_positions
        self._device = device
        self.rotary_dim = 2 * len(frequencies(original))
        self.sets: AngleSets = SetsByLength(original, NUM_PLACES, max_positions, self._fill)
        self._host: Rows | None = None
        self._table: Tensor | None = None

    def covering(self, num_positions: int) -> Rows:
        """See AngleTable."""
        if self._host is None:
            self._host = np.zeros((self._num_rows, self.rotary_dim), np.float32)
            self._fill(0, self._original, self._original)
        return self._host

    def on_device(self, num_positions: int) -> Tensor:
        """See AngleTable."""
        if self._table is None:
            self._table = torch.from_numpy(self.covering(num_positions)).to(self._device)
        return self._table

    def num_bytes(self, num_positions: int) -> int:
        """See AngleTable."""
        return 4 * self.rotary_dim * self._num_rows

    def _fill(self, first_row: int, length: int, count: int) -> None:
        rows = self.covering(0)[first_row : first_row + count]
        rows[:] = _angles(count, self._frequencies(length).numpy(), 1.0)
        if self._table is not None and self._device.type != "cpu":
            # Behind the steps that are under way, which read other rows.
            self._table[first_row : first_row + count].copy_(without_waiting(torch.from_numpy(rows), self._device))


def _angles(num_positions: int, frequencies: Rows, magnitude: float) -> Rows:
    angles = np.arange(num_positions, dtype=np.float32)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * np.float32(magnitude)
