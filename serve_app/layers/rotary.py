"""Rotary position embedding: plain, with linear scaling, and Llama 3's."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How frequencies are stretched for longer contexts; the last three fields are Llama 3's alone."""

    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def inverse_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Radians per position of each rotated pair, float32 [rotary_dim / 2] on the CPU."""
    frequencies = 1.0 / theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Keeps short waves, divides long ones by the factor, blends between. Source: Meta's Llama 3.1 model code."""
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    share = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0.0, 1.0)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


class Rotary:
    """Angles of queries and keys of all layers that share them; the table grows with the longest context seen."""

    def __init__(self, frequencies: Tensor, max_positions: int) -> None:
        """frequencies [rotary_dim / 2] float32 on the model's device; max_positions: of the model."""
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
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
