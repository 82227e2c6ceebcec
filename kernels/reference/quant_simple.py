"""Decoders of the block types with one scale a block: [n, block_bytes] uint8 → [n, block_length] float32.

`fields` in kernels.formats says where everything lies. Products are taken in float32 in the order of ggml's reference
code, so that results agree with it bit for bit.
"""

import torch
from torch import Tensor

from kernels.formats import BY_NAME

FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""E2M1 numbers by their four bits, times two."""

NON_LINEAR_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The sixteen levels of IQ4_NL and IQ4_XS."""


def field(blocks: Tensor, type_name: str, name: str) -> Tensor:
    """The bytes of one field of every block, [n, size] uint8."""
    layout = BY_NAME[type_name]
    start = layout.offset(name)
    return blocks[:, start : start + dict(layout.fields)[name]]


def as_words(data: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, size] bytes read as little-endian words. Copies: a field may begin at an odd address."""
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def half(blocks: Tensor, type_name: str, name: str) -> Tensor:
    """A float16 field as [n, 1] float32."""
    return as_words(field(blocks, type_name, name), torch.float16).float()


def bit_planes(data: Tensor, bits: int, group: int) -> Tensor:
    """[n, k * group] bytes → [n, k, 8 // bits, group]: plane p holds bits p * bits … of each byte of its group."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).view(1, 1, -1, 1)
    return (data.reshape(data.shape[0], -1, 1, group) >> shifts) & ((1 << bits) - 1)


def single_bits(data: Tensor) -> Tensor:
    """[n, k] bytes → [n, 8 * k] bits, lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data.unsqueeze(-1) >> shifts) & 1).reshape(data.shape[0], -1)


def look_up(values: tuple[int, ...], index: Tensor) -> Tensor:
    """values[index] as float32."""
    return torch.tensor(values, dtype=torch.float32, device=index.device)[index.int()]


def decode_f32(blocks: Tensor) -> Tensor:
    """Plain numbers."""
    return as_words(blocks, torch.float32)


def decode_f16(blocks: Tensor) -> Tensor:
    """Plain numbers."""
    return as_words(blocks, torch.float16).float()


def decode_bf16(blocks: Tensor) -> Tensor:
    """Plain numbers."""
    return as_words(blocks, torch.bfloat16).float()


def decode_q4_0(blocks: Tensor) -> Tensor:
    """d * (q - 8); the low nibbles are the first sixteen weights, the high ones the others."""
    q = bit_planes(field(blocks, "Q4_0", "qs"), 4, 16).flatten(1)
    return half(blocks, "Q4_0", "d") * (q.float() - 8)


def decode_q4_1(blocks: Tensor) -> Tensor:
    """d * q + m."""
    q = bit_planes(field(blocks, "Q4_1", "qs"), 4, 16).flatten(1)
    return half(blocks, "Q4_1", "d") * q.float() + half(blocks, "Q4_1", "m")


def _five_bits(blocks: Tensor, type_name: str) -> Tensor:
    low = bit_planes(field(blocks, type_name, "qs"), 4, 16).flatten(1)
    return (low | (single_bits(field(blocks, type_name, "qh")) << 4)).float()


def decode_q5_0(blocks: Tensor) -> Tensor:
    """d * (q - 16); the fifth bits are in qh."""
    return half(blocks, "Q5_0", "d") * (_five_bits(blocks, "Q5_0") - 16)


def decode_q5_1(blocks: Tensor) -> Tensor:
    """d * q + m; the fifth bits are in qh."""
    return half(blocks, "Q5_1", "d") * _five_bits(blocks, "Q5_1") + half(blocks, "Q5_1", "m")


def decode_q8_0(blocks: Tensor) -> Tensor:
    """d * q, q signed."""
    return half(blocks, "Q8_0", "d") * field(blocks, "Q8_0", "qs").view(torch.int8).float()


def decode_iq4_nl(blocks: Tensor) -> Tensor:
    """d * one of sixteen levels."""
    q = bit_planes(field(blocks, "IQ4_NL", "qs"), 4, 16).flatten(1)
    return half(blocks, "IQ4_NL", "d") * look_up(NON_LINEAR_VALUES, q)


def decode_tq1_0(blocks: Tensor) -> Tensor:
    """d * {-1, 0, 1}: five base-3 digits a byte, four in the last four bytes.

    A byte is its digits' fraction of 243, scaled to 256 and rounded up: times a power of three (modulo 256), the next
    digit is the whole part of three times the rest.
    """
    qs = field(blocks, "TQ1_0", "qs")
    parts = ((qs[:, :32], 5), (qs[:, 32:], 5), (field(blocks, "TQ1_0", "qh"), 4))
    rests = []
    for data, digits in parts:
        powers = torch.tensor([3**i for i in range(digits)], dtype=torch.uint8, device=data.device)
        rests.append((data.unsqueeze(1) * powers.view(1, -1, 1)).flatten(1))
    digit = (torch.cat(rests, dim=1).int() * 3) >> 8
    return half(blocks, "TQ1_0", "d") * (digit.float() - 1)


def decode_tq2_0(blocks: Tensor) -> Tensor:
    """d * (q - 1), two bits each."""
    q = bit_planes(field(blocks, "TQ2_0", "qs"), 2, 32).flatten(1)
    return half(blocks, "TQ2_0", "d") * (q.float() - 1)


def decode_mxfp4(blocks: Tensor) -> Tensor:
    """2^(e - 128) * a doubled E2M1 number. Source: OCP Microscaling Formats 1.0."""
    exponent = field(blocks, "MXFP4", "e").int()
    # The float's bits are built directly: for e = 0 and 1 the scale is subnormal.
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1).clamp(min=0) << 23)
    q = bit_planes(field(blocks, "MXFP4", "qs"), 4, 16).flatten(1)
    return bits.view(torch.float32) * look_up(FP4_VALUES, q)


def decode_nvfp4(blocks: Tensor) -> Tensor:
    """Four sub-blocks of sixteen doubled E2M1 numbers, each with an unsigned E4M3 scale (bias 7; 0x7F is zero)."""
    code = field(blocks, "NVFP4", "d").int()
    exponent, mantissa = (code >> 3) & 15, (code & 7).float()
    normal = torch.ldexp(1 + mantissa / 8, exponent - 7)
    scale = torch.where(exponent == 0, mantissa * 2.0**-9, normal) * 0.5
    scale = torch.where(code == 0x7F, torch.zeros_like(scale), scale)
    q = bit_planes(field(blocks, "NVFP4", "qs"), 4, 8).flatten(2)
    return (scale.unsqueeze(-1) * look_up(FP4_VALUES, q)).flatten(1)
