"""Decoders of the K types: super-blocks of 256 weights, sub-blocks with quantised scales.

[n, block_bytes] uint8 → [n, 256] float32; the conventions of quant_simple hold.
"""

import torch
from torch import Tensor

from kernels.reference.quant_simple import bit_planes, field, half


def decode_q2_k(blocks: Tensor) -> Tensor:
    """d * scale * q - dmin * min: sixteen sub-blocks, 4-bit scale (low nibble) and minimum (high nibble)."""
    scales = field(blocks, "Q2_K", "scales")
    scale = (half(blocks, "Q2_K", "d") * (scales & 15).float()).unsqueeze(-1)
    minimum = (half(blocks, "Q2_K", "dmin") * (scales >> 4).float()).unsqueeze(-1)
    q = bit_planes(field(blocks, "Q2_K", "qs"), 2, 32).reshape(-1, 16, 16).float()
    return (scale * q - minimum).flatten(1)


def decode_q3_k(blocks: Tensor) -> Tensor:
    """d * (scale - 32) * q: sixteen sub-blocks; q is signed, its sign bit is the inverse of the one in hmask.

    Scales have six bits: the low four in the nibbles of the first eight bytes, the high two in the last four bytes.
    """
    packed = field(blocks, "Q3_K", "scales")
    low = bit_planes(packed[:, :8], 4, 8).flatten(1)
    high = bit_planes(packed[:, 8:], 2, 4).flatten(1)
    scale = half(blocks, "Q3_K", "d") * ((low | (high << 4)).float() - 32)
    q_low = bit_planes(field(blocks, "Q3_K", "qs"), 2, 32).reshape(-1, 16, 16).float()
    is_positive = bit_planes(field(blocks, "Q3_K", "hmask"), 1, 32).reshape(-1, 16, 16).float()
    return (scale.unsqueeze(-1) * (q_low - (1 - is_positive) * 4)).flatten(1)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 12] bytes → eight 6-bit scales and eight 6-bit minima, [n, 8] float32 each.

    Bytes 0–3 and 4–7 hold the first four scales and minima whole, and in their top bits the high bits of the last four,
    whose low bits are the nibbles of bytes 8–11.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minimum = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return scale.float(), minimum.float()


def _scaled(blocks: Tensor, type_name: str, q: Tensor) -> Tensor:
    """d * scale * q - dmin * min for q [n, 8, 32] float32."""
    scale, minimum = _scales_and_minima(field(blocks, type_name, "scales"))
    scale = (half(blocks, type_name, "d") * scale).unsqueeze(-1)
    minimum = (half(blocks, type_name, "dmin") * minimum).unsqueeze(-1)
    return (scale * q - minimum).flatten(1)


def decode_q4_k(blocks: Tensor) -> Tensor:
    """Eight sub-blocks of 32, six-bit scales and minima, four-bit weights."""
    q = bit_planes(field(blocks, "Q4_K", "qs"), 4, 32).reshape(-1, 8, 32)
    return _scaled(blocks, "Q4_K", q.float())


def decode_q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K; bit i of byte j of qh is the fifth bit of weight j of sub-block i."""
    low = bit_planes(field(blocks, "Q5_K", "qs"), 4, 32).reshape(-1, 8, 32)
    high = bit_planes(field(blocks, "Q5_K", "qh"), 1, 32).reshape(-1, 8, 32)
    return _scaled(blocks, "Q5_K", (low | (high << 4)).float())


def decode_q6_k(blocks: Tensor) -> Tensor:
    """d * scale * (q - 32): sixteen sub-blocks with signed 8-bit scales; low four bits in ql, high two in qh."""
    scales = field(blocks, "Q6_K", "scales").view(torch.int8).float()
    scale = (half(blocks, "Q6_K", "d") * scales).unsqueeze(-1)
    low = bit_planes(field(blocks, "Q6_K", "ql"), 4, 64).reshape(-1, 8, 32)
    high = bit_planes(field(blocks, "Q6_K", "qh"), 2, 32).reshape(-1, 8, 32)
    q = (low | (high << 4)).reshape(-1, 16, 16).float() - 32
    return (scale * q).flatten(1)
