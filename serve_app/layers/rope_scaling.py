"""How rotary frequencies are stretched for contexts longer than a model was first trained on."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A scaling and its numbers; those of other kinds are not looked at.

    magnitude: what cosines and sines are multiplied with (yarn, longrope). original_max_position_embeddings: tokens of
    the first training. low_freq_factor, high_freq_factor: llama3's. beta_fast, beta_slow, truncates: yarn's.
    short_factor, long_factor: longrope's divisors of each frequency, up to the original length and beyond it; empty
    where the weights hold them.
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    magnitude: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def inverse_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Radians per position of each rotated pair, float32 [rotary_dim / 2] on the CPU.

    longrope: undivided, its two sets are made from it. dynamic: those up to the original length, see dynamic_base().
    """
    frequencies = 1.0 / theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.kind == "yarn":
        return _yarn(frequencies, rotary_dim, theta, scaling)
    return frequencies


def dynamic_base(theta: float, rotary_dim: int, scaling: RopeScaling, length: int) -> float:
    """The base of the frequencies for a text of so many tokens: it grows beyond the original length.

    Source: transformers' `dynamic` rope ("NTK-aware scaling" by the length of the text).
    """
    original = scaling.original_max_position_embeddings
    stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
    return float(theta * stretch ** (rotary_dim / (rotary_dim - 2)))


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """Peng et al. 2023, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def longrope_magnitude(factor: float, original: int) -> float:
    """Ding et al. 2024, as Phi-3's model code has it. factor: the longest context over the original one."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Keeps short waves, divides long ones by the factor, blends between. Source: Meta's Llama 3.1 model code."""
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    share = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0.0, 1.0)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


def _yarn(frequencies: Tensor, rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Keeps pairs that turn more than beta_fast times within the original length, divides those below beta_slow by the
    factor, blends between by the pair's index. Source: Peng et al. 2023, section 3.2."""

    def pair_turning(num_turns: float) -> float:
        length = scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return rotary_dim * math.log(length) / (2 * math.log(theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    steps = torch.arange(rotary_dim // 2, dtype=torch.float32)
    share = ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return share * frequencies / scaling.factor + (1 - share) * frequencies
