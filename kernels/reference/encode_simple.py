"""Encoders of the types with one scale a block: [rows, columns] float32 → [rows, bytes per row] uint8.

The second argument is the importance of the columns or None; with one, the scales are searched for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference.encode_search import IN_TORCH, Searches, by, over, root
from kernels.reference.quant_simple import FP4_VALUES

_BLOCK = 32


def as_bytes(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] or [n, k] numbers → the bytes of each row in that dtype, uint8 [n, bytes]."""
    return values.reshape(len(values), -1).to(dtype).contiguous().view(torch.uint8)


def join(rows: int, parts: Sequence[Tensor]) -> Tensor:
    """Fields [blocks, bytes] side by side → [rows, bytes per row]."""
    return torch.cat([p.to(torch.uint8) for p in parts], dim=1).reshape(rows, -1)


def encode_f32(x: Tensor, _: Tensor | None = None) -> Tensor:
    """Plain numbers."""
    return as_bytes(x, torch.float32)


def encode_f16(x: Tensor, _: Tensor | None = None) -> Tensor:
    """Plain numbers, rounded to the nearest."""
    return as_bytes(x, torch.float16)


def encode_bf16(x: Tensor, _: Tensor | None = None) -> Tensor:
    """Plain numbers, rounded to the nearest."""
    return as_bytes(x, torch.bfloat16)


def _weights(x: Tensor, importance: Tensor, searches: Searches) -> Tensor:
    """importance * sqrt(x^2 + the row's mean square), [32, blocks]."""
    mean = by(searches.running_sum((x * x).T), x.shape[1])
    w = importance * root(mean.unsqueeze(1) + x * x)
    return w.reshape(-1, _BLOCK).T.contiguous()


def _packed(codes: Tensor, bits: int) -> list[Tensor]:
    """codes [blocks, 32] → the field of fifth bits, if there are any, and the nibbles."""
    q = codes.int()
    nibbles = (q[:, :16] & 15) | (q[:, 16:] & 15) << 4
    if bits == 4:
        return [nibbles]
    high = (q >> 4 & 1).view(-1, 4, 8) << torch.arange(8, device=q.device)
    return [high.sum(-1), nibbles]


def _inverse(d: Tensor) -> tuple[Tensor, Tensor]:
    """1 / d, 0 for 0, and where that overflows: there all codes are zero."""
    inverse = torch.where(d != 0, over(1, d), 0.0)
    return inverse, ~torch.isfinite(inverse)


def _symmetric(x: Tensor, importance: Tensor | None, bits: int, searches: Searches) -> Tensor:
    top = 1 << (bits - 1)
    blocks = x.reshape(-1, _BLOCK)
    if importance is not None:
        d, found = searches.search_symmetric(blocks.T.contiguous(), _weights(x, importance, searches), top)
        codes = found.T
    else:
        extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        d = (torch.where(extreme == 0, 0.0, extreme) / -top)[:, 0]
        inverse, is_lost = _inverse(d)
        codes = (blocks * inverse.unsqueeze(1) + (top + 0.5)).clamp(0, 2 * top - 1).trunc()
        codes[is_lost] = 0
    return join(len(x), [as_bytes(d, torch.float16), *_packed(codes, bits)])


def _affine(x: Tensor, importance: Tensor | None, bits: int, searches: Searches) -> Tensor:
    top = (1 << bits) - 1
    blocks = x.reshape(-1, _BLOCK)
    if importance is not None:
        columns = blocks.T.contiguous()
        found = searches.search_affine(columns, _weights(x, importance, searches), top, -0.9, 0.05, 36)
        d, m, codes = found.scale, -found.minimum, found.codes(columns, top).T
    else:
        # Of zeros of both signs the first counts.
        m = blocks.gather(1, (blocks == blocks.amin(1, keepdim=True)).int().argmax(1, keepdim=True))[:, 0]
        most = blocks.gather(1, (blocks == blocks.amax(1, keepdim=True)).int().argmax(1, keepdim=True))[:, 0]
        d = (most - m) / top
        inverse, is_lost = _inverse(d)
        codes = ((blocks - m.unsqueeze(1)) * inverse.unsqueeze(1) + 0.5).clamp(0, top).trunc()
        codes[is_lost] = 0
    return join(len(x), [as_bytes(d, torch.float16), as_bytes(m, torch.float16), *_packed(codes, bits)])


def encode_q4_0(x: Tensor, importance: Tensor | None = None, searches: Searches = IN_TORCH) -> Tensor:
    """d * (q - 8), the value of largest magnitude at q = 0."""
    return _symmetric(x, importance, 4, searches)


def encode_q5_0(x: Tensor, importance: Tensor | None = None, searches: Searches = IN_TORCH) -> Tensor:
    """d * (q - 16), the value of largest magnitude at q = 0."""
    return _symmetric(x, importance, 5, searches)


def encode_q4_1(x: Tensor, importance: Tensor | None = None, searches: Searches = IN_TORCH) -> Tensor:
    """d * q + m, from the least value to the largest."""
    return _affine(x, importance, 4, searches)


def encode_q5_1(x: Tensor, importance: Tensor | None = None, searches: Searches = IN_TORCH) -> Tensor:
    """d * q + m, from the least value to the largest."""
    return _affine(x, importance, 5, searches)


def _eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [blocks] and codes [blocks, 32], halves rounded away from zero."""
    blocks = x.reshape(-1, _BLOCK)
    d = blocks.abs().amax(1) / 127
    inverse, is_lost = _inverse(d)
    v = torch.where(is_lost.unsqueeze(1), 0.0, blocks * inverse.unsqueeze(1))
    whole = v.trunc()
    rest = v - whole
    return d, whole + (rest >= 0.5).float() - (rest <= -0.5).float()


def encode_q8_0(x: Tensor, _: Tensor | None = None) -> Tensor:
    """d * q."""
    d, codes = _eight_bits(x)
    return join(len(x), [as_bytes(d, torch.float16), as_bytes(codes, torch.int8)])


def encode_q8_1(x: Tensor, _: Tensor | None = None) -> Tensor:
    """d * q, and d times the sum of all q."""
    d, codes = _eight_bits(x)
    return join(
        len(x), [as_bytes(d, torch.float16), as_bytes(codes.sum(1) * d, torch.float16), as_bytes(codes, torch.int8)]
    )


def encode_mxfp4(x: Tensor, _: Tensor | None = None) -> Tensor:
    """2^(e - 128) * the nearest doubled E2M1 number, of two equally near ones the one with the smaller code."""
    blocks = x.reshape(-1, _BLOCK)
    most = blocks.abs().amax(1)
    exponent = torch.where(most > 0, most.log2().floor() + 125, 0.0).clamp(min=0).int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1).clamp(min=0) << 23)
    levels = bits.view(torch.float32).unsqueeze(1) * torch.tensor(FP4_VALUES, dtype=torch.float32)
    best = (levels[:, :1] - blocks).abs()
    codes = torch.zeros_like(blocks)
    for level in range(1, len(FP4_VALUES)):
        lost = (levels[:, level : level + 1] - blocks).abs()
        codes = torch.where(lost < best, float(level), codes)
        best = torch.minimum(lost, best)
    return join(len(x), [exponent.unsqueeze(1), *_packed(codes, 4)])
