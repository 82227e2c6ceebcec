"""Decoders of the types that GGUF files do not hold weights in: [n, block_bytes] uint8 → [n, block_length] float32.

The conventions of quant_simple hold.
"""

import torch
from torch import Tensor

from kernels.reference.quant_simple import as_words, bit_planes, field, half


def word(blocks: Tensor, type_name: str, name: str) -> Tensor:
    """A float32 field as [n, 1]."""
    return as_words(field(blocks, type_name, name), torch.float32)


def decode_q8_1(blocks: Tensor) -> Tensor:
    """d * q, q signed; s, d times the sum of all q, is for products of two quantised vectors."""
    return half(blocks, "Q8_1", "d") * field(blocks, "Q8_1", "qs").view(torch.int8).float()


def decode_q8_k(blocks: Tensor) -> Tensor:
    """d * q, q signed."""
    return word(blocks, "Q8_K", "d") * field(blocks, "Q8_K", "qs").view(torch.int8).float()


def decode_fp8(blocks: Tensor) -> Tensor:
    """d * an E4M3 number."""
    return word(blocks, "FP8", "d") * field(blocks, "FP8", "qs").view(torch.float8_e4m3fn).float()


def decode_hqq4(blocks: Tensor) -> Tensor:
    """(q - zero) * step; the low nibbles are the first 32 weights."""
    q = bit_planes(field(blocks, "HQQ4", "qs"), 4, 32).flatten(1).float()
    return (q - word(blocks, "HQQ4", "zero")) * word(blocks, "HQQ4", "step")


def decode_hqq8(blocks: Tensor) -> Tensor:
    """(q - zero) * step."""
    return (field(blocks, "HQQ8", "qs").float() - word(blocks, "HQQ8", "zero")) * word(blocks, "HQQ8", "step")
