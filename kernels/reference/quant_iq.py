"""Decoders of the IQ types: groups of four or eight weights are points of a fixed grid.

[n, block_bytes] uint8 → [n, 256] float32; the conventions of quant_simple hold. Words are widened to int32: torch has
few operations on unsigned ones, so every shift is followed by a mask.
"""

from functools import cache

import torch
from torch import Tensor

from kernels.reference.iq_grids import points
from kernels.reference.quant_simple import (
    NON_LINEAR_VALUES,
    as_words,
    bit_planes,
    field,
    half,
    look_up,
    single_bits,
)

_DELTA = 0.125  # how far IQ1 weights are moved from the grid


@cache
def _grid(name: str, device: torch.device) -> Tensor:
    """All points [points, 4 or 8] float32; shared: not to be written."""
    return torch.from_numpy(points(name)).float().to(device)


def _points(name: str, index: Tensor) -> Tensor:
    """Grid points [n, k, 4 or 8] of the indices [n, k]."""
    return _grid(name, index.device)[index.int()]


def _factors(bits: Tensor) -> Tensor:
    """1 for a clear bit, -1 for a set one."""
    return 1.0 - 2.0 * bits.float()


def _even_signs(index: Tensor) -> Tensor:
    """[n, k] 7-bit sign patterns → [n, k, 8] factors; the eighth makes the number of minus signs even."""
    bits = (index.unsqueeze(-1) >> torch.arange(7, device=index.device)) & 1
    return _factors(torch.cat((bits, bits.sum(-1, keepdim=True) & 1), dim=-1))


def _nibbles(data: Tensor) -> Tensor:
    """[n, k] bytes → [n, 2 k]: low nibble, high nibble of each."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def _fields_of(words: Tensor, bits: int, count: int) -> Tensor:
    """[n, k] words → [n, k, count]: consecutive fields of the given width, lowest first."""
    shifts = torch.arange(0, bits * count, bits, device=words.device)
    return (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)


def _product(scale: Tensor, points: Tensor, signs: Tensor) -> Tensor:
    """scale [n, s], points and signs [n, k, g] in the same order; a scale covers k / s groups."""
    n, s = scale.shape
    return (scale.view(n, s, 1) * points.reshape(n, s, -1) * signs.reshape(n, s, -1)).flatten(1)


def decode_iq2_xxs(blocks: Tensor) -> Tensor:
    """Per 32 weights: four grid indices of 8 bits, then a word of four 7-bit sign patterns and a 4-bit scale."""
    words = as_words(field(blocks, "IQ2_XXS", "qs"), torch.int32)[:, 1::2]
    index = field(blocks, "IQ2_XXS", "qs").reshape(-1, 8, 8)[:, :, :4].flatten(1)
    scale = half(blocks, "IQ2_XXS", "d") * (0.5 + ((words >> 28) & 15).float()) * 0.25
    return _product(scale, _points("IQ2_XXS", index), _even_signs(_fields_of(words, 7, 4).flatten(1)))


def decode_iq2_xs(blocks: Tensor) -> Tensor:
    """Per 8 weights a word: 9 bits of grid index, 7 of signs; 4-bit scales per 16 weights."""
    words = as_words(field(blocks, "IQ2_XS", "qs"), torch.int16).int()
    scale = half(blocks, "IQ2_XS", "d") * (0.5 + _nibbles(field(blocks, "IQ2_XS", "scales")).float()) * 0.25
    return _product(scale, _points("IQ2_XS", words & 511), _even_signs((words >> 9) & 127))


def decode_iq2_s(blocks: Tensor) -> Tensor:
    """10-bit grid indices (two bits of each in qh), a sign bit for every weight, 4-bit scales per 16 weights."""
    high = _fields_of(field(blocks, "IQ2_S", "qh").int(), 2, 4).flatten(1)
    index = field(blocks, "IQ2_S", "qs").int() | (high << 8)
    scale = half(blocks, "IQ2_S", "d") * (0.5 + _nibbles(field(blocks, "IQ2_S", "scales")).float()) * 0.25
    signs = _factors(single_bits(field(blocks, "IQ2_S", "signs")))
    return _product(scale, _points("IQ2_S", index), signs)


def decode_iq3_xxs(blocks: Tensor) -> Tensor:
    """Grid indices of 8 bits for 4 weights; per 32 weights a word of four 7-bit sign patterns and a 4-bit scale."""
    words = as_words(field(blocks, "IQ3_XXS", "scales"), torch.int32)
    scale = half(blocks, "IQ3_XXS", "d") * (0.5 + ((words >> 28) & 15).float()) * 0.5
    signs = _even_signs(_fields_of(words, 7, 4).flatten(1))
    return _product(scale, _points("IQ3_XXS", field(blocks, "IQ3_XXS", "qs")), signs)


def decode_iq3_s(blocks: Tensor) -> Tensor:
    """9-bit grid indices for 4 weights (the ninth in qh), a sign bit for every weight, odd scales per 32 weights."""
    high = single_bits(field(blocks, "IQ3_S", "qh")).int()
    index = field(blocks, "IQ3_S", "qs").int() | (high << 8)
    scale = half(blocks, "IQ3_S", "d") * (1 + 2 * _nibbles(field(blocks, "IQ3_S", "scales"))).float()
    signs = _factors(single_bits(field(blocks, "IQ3_S", "signs")))
    return _product(scale, _points("IQ3_S", index), signs)


def decode_iq1_s(blocks: Tensor) -> Tensor:
    """Per 32 weights a word of qh: four times 3 high bits of a grid index, a 3-bit scale, the sign of the shift."""
    words = as_words(field(blocks, "IQ1_S", "qh"), torch.int16).int()
    index = field(blocks, "IQ1_S", "qs").int() | (_fields_of(words, 3, 4).flatten(1) << 8)
    scale = half(blocks, "IQ1_S", "d") * (2 * ((words >> 12) & 7) + 1).float()
    delta = _DELTA * _factors((words >> 15) & 1)
    points = _points("IQ1", index).reshape(-1, 8, 32)
    return (scale.unsqueeze(-1) * (points + delta.unsqueeze(-1))).flatten(1)


def decode_iq1_m(blocks: Tensor) -> Tensor:
    """As IQ1_S with 3-bit scales per 16 weights and a shift per 8; d is spread over the top nibbles of the scales."""
    words = as_words(field(blocks, "IQ1_M", "scales"), torch.int16).int()
    top = (words >> 12) & 15
    d_bits = top[:, 0] | (top[:, 1] << 4) | (top[:, 2] << 8) | (top[:, 3] << 12)
    d = d_bits.to(torch.int16).view(torch.float16).float().unsqueeze(-1)
    scale = d * (2 * _fields_of(words, 3, 4).flatten(1) + 1).float()
    high = _nibbles(field(blocks, "IQ1_M", "qh")).int()
    index = field(blocks, "IQ1_M", "qs").int() | ((high & 7) << 8)
    delta = _DELTA * _factors((high >> 3) & 1)
    points = (_points("IQ1", index) + delta.unsqueeze(-1)).reshape(-1, 16, 16)
    return (scale.unsqueeze(-1) * points).flatten(1)


def decode_iq4_xs(blocks: Tensor) -> Tensor:
    """IQ4_NL's levels with 6-bit scales (less 32) per 32 weights: four bits in scales_l, two in scales_h."""
    low = _nibbles(field(blocks, "IQ4_XS", "scales_l")).int()
    high = _fields_of(as_words(field(blocks, "IQ4_XS", "scales_h"), torch.int16).int(), 2, 8).flatten(1)
    scale = half(blocks, "IQ4_XS", "d") * ((low | (high << 4)) - 32).float()
    q = bit_planes(field(blocks, "IQ4_XS", "qs"), 4, 16).reshape(-1, 8, 32)
    return (scale.unsqueeze(-1) * look_up(NON_LINEAR_VALUES, q)).flatten(1)
