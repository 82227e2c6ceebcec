"""The arithmetic that docs/kernels.md writes out, step by step in numpy, gives the kernels' bits.

A float32 fma is computed in float64, where the product is exact, and rounded once more; that differs from a true one in
about one of 2^29 cases, and in none of these, whose numbers are fixed.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.cpu.packed import PackedMatrix

F32 = np.float32
Q4_0, Q4_K, Q6_K = 2, 12, 14


def fma(isa: str, a: F32, b: F32, c: F32) -> F32:
    """The plain build has no fused operation: it rounds the product too."""
    if isa == "generic":
        return F32(F32(a * b) + c)
    return F32(np.float64(a) * np.float64(b) + np.float64(c))


def quantised(x: NDArray[np.float32]) -> tuple[NDArray[np.int64], F32]:
    """q and the scale of one block of activations."""
    top = np.abs(x).max()
    return np.rint(x * (F32(127) / top)).astype(np.int64), F32(top / F32(127))


def q4_k_blocks(count: int) -> NDArray[np.uint8]:
    """[count, 144]: random, with small scales."""
    blocks = np.random.default_rng(5).integers(0, 256, (count, 144), dtype=np.uint8)
    blocks[:, 0:4] = np.array([0.011, 0.007], np.float16).view(np.uint8)
    return blocks


def q4_k_dot(isa: str, row: NDArray[np.uint8], x: NDArray[np.float32]) -> F32:
    """One row of Q4_K times one token."""
    acc = F32(0)
    for b, block in enumerate(row.reshape(-1, 144)):
        d, dmin = block[:4].view(np.float16).astype(np.float32)
        packed, nibbles = block[4:16].astype(np.int64), block[16:].astype(np.int64)
        q, x_scale = quantised(x[b * 256 : (b + 1) * 256])
        s, from_sums = F32(0), 0
        for k in range(8):
            if k < 4:
                scale, minimum = packed[k] & 63, packed[k + 4] & 63
            else:
                scale = (packed[k + 4] & 15) | (packed[k - 4] >> 6 << 4)
                minimum = (packed[k + 4] >> 4) | (packed[k] >> 6 << 4)
            weights = nibbles[k // 2 * 32 : k // 2 * 32 + 32] >> 4 * (k % 2) & 15
            part = q[k * 32 : k * 32 + 32]
            s = fma(isa, F32(weights @ part), F32(scale), s)
            from_sums += minimum * part.sum()
        acc = fma(isa, s, F32(d * x_scale), acc)
        acc = fma(isa, F32(from_sums), F32(-dmin * x_scale), acc)
    return acc


def q6_k_dot(isa: str, row: NDArray[np.uint8], x: NDArray[np.float32]) -> F32:
    """One row of Q6_K times one token."""
    acc = F32(0)
    for b, block in enumerate(row.reshape(-1, 210)):
        low, high = block[:128].astype(np.int64).reshape(2, 64), block[128:192].astype(np.int64).reshape(2, 32)
        scales, d = block[192:208].view(np.int8).astype(np.int64), block[208:].view(np.float16).astype(np.float32)[0]
        q, x_scale = quantised(x[b * 256 : (b + 1) * 256])
        s, from_sums = F32(0), 0
        for k in range(16):
            half, part, first = k // 8, k % 8 // 2, k % 2 * 16
            nibbles = low[half, part % 2 * 32 + first :][:16] >> part // 2 * 4 & 15
            weights = nibbles | (high[half, first : first + 16] >> 2 * part & 3) << 4
            piece = q[k * 16 : k * 16 + 16]
            s = fma(isa, F32(weights @ piece), F32(scales[k]), s)
            from_sums += scales[k] * piece.sum()
        acc = fma(isa, F32(s - F32(F32(from_sums) * F32(32))), F32(d * x_scale), acc)
    return acc


def q4_0_dot(isa: str, row: NDArray[np.uint8], x: NDArray[np.float32]) -> F32:
    """One row of Q4_0 times one token."""
    acc = F32(0)
    for b, block in enumerate(row.reshape(-1, 18)):
        q, x_scale = quantised(x[b * 32 : (b + 1) * 32])
        nibbles = block[2:].astype(np.int64)
        dot = np.concatenate([nibbles & 15, nibbles >> 4]) @ q - 8 * q.sum()
        acc = fma(isa, F32(F32(dot) * F32(block[:2].view(np.float16)[0])), x_scale, acc)
    return acc


def product(type_id: int, blocks: NDArray[np.uint8], x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The kernels' [tokens, rows]."""
    matrix = PackedMatrix.of(type_id, torch.from_numpy(blocks), x.shape[1])
    return np.asarray(matrix.matmul(torch.from_numpy(x)).numpy())


@pytest.mark.parametrize("num_tokens", [1, 3, 21])
def test_q4_k(each_isa: str, num_tokens: int) -> None:
    blocks = q4_k_blocks(6).reshape(3, 288)
    x = np.random.default_rng(num_tokens).standard_normal((num_tokens, 512), dtype=np.float32)
    expected = [[q4_k_dot(each_isa, row, token) for row in blocks] for token in x]
    assert product(Q4_K, blocks, x).tobytes() == np.array(expected, np.float32).tobytes()


@pytest.mark.parametrize("num_tokens", [1, 4, 9])
def test_q6_k(each_isa: str, num_tokens: int) -> None:
    blocks = np.random.default_rng(6).integers(0, 256, (6, 210), dtype=np.uint8)
    blocks[:, 208:] = np.array([0.0017], np.float16).view(np.uint8)
    blocks = blocks.reshape(3, 420)
    x = np.random.default_rng(num_tokens).standard_normal((num_tokens, 512), dtype=np.float32)
    expected = [[q6_k_dot(each_isa, row, token) for row in blocks] for token in x]
    assert product(Q6_K, blocks, x).tobytes() == np.array(expected, np.float32).tobytes()


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_q4_0(each_isa: str, num_tokens: int) -> None:
    blocks = np.random.default_rng(7).integers(0, 256, (12, 18), dtype=np.uint8)
    blocks[:, :2] = np.array([0.013], np.float16).view(np.uint8)
    blocks = blocks.reshape(4, 54)
    x = np.random.default_rng(num_tokens).standard_normal((num_tokens, 96), dtype=np.float32)
    expected = [[q4_0_dot(each_isa, row, token) for row in blocks] for token in x]
    assert product(Q4_0, blocks, x).tobytes() == np.array(expected, np.float32).tobytes()
