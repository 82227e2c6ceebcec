"""Encoders of the K types: [rows, columns] float32 → [rows, bytes per row] uint8; conventions of encode_simple.

Scales of sub-blocks are searched for, quantised in their turn, and the codes made anew from what they have become.
`searches`: what searches on the device where x lies; everything else is torch, on any device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference.encode_search import IN_TORCH, ZERO_MAGNITUDE, Affine, Searches, by, nearest, over, root
from kernels.reference.encode_simple import as_bytes, join

_SUPER = 256


def _columns(x: Tensor, n: int) -> Tensor:
    """Sub-blocks of n weights as columns, [n, sub-blocks]."""
    return x.reshape(-1, n).T.contiguous()


def _weights(x: Tensor, importance: Tensor, n: int, times: float, searches: Searches) -> Tensor:
    """importance * sqrt(x^2 + times * the super-block's mean square), [n, sub-blocks]."""
    blocks = x.reshape(-1, _SUPER)
    mean = times * searches.running_sum((blocks * blocks).T) / _SUPER
    counts = importance.expand(len(x), -1).reshape(-1, _SUPER)
    return _columns(counts * root(mean.unsqueeze(1) + blocks * blocks), n)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


@dataclass(frozen=True, slots=True)
class _AffineBlocks:
    """Quantised scales and minima [super-blocks, subs], d and dmin [super-blocks], codes [super-blocks, 256]."""

    scales: Tensor
    minima: Tensor
    d: Tensor
    dmin: Tensor
    codes: Tensor


def _by_extreme(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """values [super-blocks, subs] → step so that the largest is at top, and codes."""
    most = values.amax(1)
    most = torch.where(most > 0, most, 0.0)  # clamping would keep the sign of a zero
    codes = nearest(over(top, most).unsqueeze(1) * values) % 256
    return by(most, top), torch.where((most > 0).unsqueeze(1), codes, 0.0)


def _affine(
    x: Tensor, found: Affine, w: Tensor | None, n: int, top: int, scale_top: int, searches: Searches
) -> _AffineBlocks:
    subs = _SUPER // n
    scale, minimum = found.scale.view(-1, subs), found.minimum.view(-1, subs)
    if w is None:
        d, scales = _by_extreme(scale, scale_top)
        dmin, minima = _by_extreme(minimum, scale_top)
    else:
        sums = searches.running_sum(w).view(-1, subs).T.contiguous()
        d, scales = searches.quantise_scales(scale.T.contiguous(), sums, scale_top)
        dmin, minima = searches.quantise_scales(minimum.T.contiguous(), sums, scale_top)
        scales, minima = scales.T, minima.T
    scales, minima = scales.clamp(max=scale_top), minima.clamp(max=scale_top)
    step = (_half(d).unsqueeze(1) * scales).reshape(-1)
    low = (_half(dmin).unsqueeze(1) * minima).reshape(-1)
    columns = _columns(x, n)
    codes = torch.where(step != 0, nearest((columns + low) / step).clamp(0, top), found.codes(columns, top))
    return _AffineBlocks(scales.int(), minima.int(), d, dmin, codes.T.reshape(-1, _SUPER).int())


def _planes(codes: Tensor, bits: int, group: int) -> Tensor:
    """[blocks, 256] → bytes: 8 / bits codes that are `group` apart share one, the first in the lowest bits."""
    parts = codes.reshape(len(codes), -1, 8 // bits, group)
    return sum((parts[:, :, i] << bits * i for i in range(8 // bits)), torch.zeros_like(parts[:, :, 0])).flatten(1)


def encode_q2_k(x: Tensor, importance: Tensor | None = None, searches: Searches = IN_TORCH) -> Tensor:
    """Sixteen sub-blocks: four-bit scales and minima, two-bit codes. Without importance the loss is of magnitudes."""
    columns = _columns(x, 16)
    if importance is None:
        w, found = None, searches.search_affine(columns, columns.abs(), 3, -0.5, 0.1, 15, is_absolute=True)
    else:
        w = _weights(x, importance, 16, 1.0, searches)
        found = searches.search_affine(columns, w, 3, -0.9, 0.05, 36)
    b = _affine(x, found, w, 16, 3, 15, searches)
    scales = b.scales | b.minima << 4
    return join(
        len(x), [scales, _planes(b.codes, 2, 32), as_bytes(b.d, torch.float16), as_bytes(b.dmin, torch.float16)]
    )


def _q45_k(x: Tensor, importance: Tensor | None, bits: int, first: float, count: int, searches: Searches) -> Tensor:
    top = (1 << bits) - 1
    columns = _columns(x, 32)
    if importance is None:
        mean = root(searches.running_sum(columns * columns) / 32)
        w, found = None, searches.search_affine(columns, mean + columns.abs(), top, first, 0.1, count)
    else:
        w = _weights(x, importance, 32, 2.0, searches)
        found = searches.search_affine(columns, w, top, -0.9, 0.05, 36)
    b = _affine(x, found, w, 32, top, 63, searches)
    low, high = slice(0, 4), slice(4, 8)
    scales = [
        b.scales[:, low] | b.scales[:, high] >> 4 << 6,
        b.minima[:, low] | b.minima[:, high] >> 4 << 6,
        (b.scales[:, high] & 15) | (b.minima[:, high] & 15) << 4,
    ]
    fifth = [_planes(b.codes >> 4, 1, 32)] if bits == 5 else []
    halves = [as_bytes(b.d, torch.float16), as_bytes(b.dmin, torch.float16)]
    return join(len(x), [*halves, *scales, *fifth, _planes(b.codes & 15, 4, 32)])


def encode_q4_k(x: Tensor, importance: Tensor | None = None, searches: Searches = IN_TORCH) -> Tensor:
    """Eight sub-blocks: six-bit scales and minima, four-bit codes."""
    return _q45_k(x, importance, 4, -1.0, 20, searches)


def encode_q5_k(x: Tensor, importance: Tensor | None = None, searches: Searches = IN_TORCH) -> Tensor:
    """As Q4_K with five-bit codes."""
    return _q45_k(x, importance, 5, -0.5, 15, searches)


def _largest(scale: Tensor) -> Tensor:
    """The scale of largest magnitude of each super-block, the first of several, [super-blocks, 1]."""
    return scale.gather(1, scale.abs().argmax(1, keepdim=True))


def _symmetric_codes(x: Tensor, d: Tensor, scales: Tensor, found: Tensor, top: int) -> Tensor:
    """Codes + top, [super-blocks, 256]: anew, or those of the search where the quantised scale is zero."""
    step = (_half(d).unsqueeze(1) * scales).reshape(-1)
    codes = torch.where(step != 0, nearest(_columns(x, 16) / step).clamp(-top, top - 1) + top, found)
    return codes.T.reshape(-1, _SUPER).int()


def encode_q3_k(x: Tensor, importance: Tensor | None = None, searches: Searches = IN_TORCH) -> Tensor:
    """Sixteen sub-blocks: six-bit signed scales, three-bit signed codes."""
    columns = _columns(x, 16)
    if importance is None:
        scale, found = searches.refine_symmetric(columns, 4)
        scale = scale.view(-1, 16)
        value = _largest(scale)
        inverse = over(-32, value)
        scales = torch.where(value != 0, nearest(inverse * scale).clamp(-32, 31) + 32, 0.0)
        d = torch.where(value != 0, over(1, inverse), 0.0)[:, 0]
    else:
        w = _weights(x, importance, 16, 2.0, searches)
        scale, found = searches.search_symmetric(columns, w, 4)
        sums = searches.running_sum(w).view(-1, 16).T.contiguous()
        d, scales = searches.search_symmetric(scale.view(-1, 16).T.contiguous(), sums, 32)
        scales = scales.T
    codes = _symmetric_codes(x, d, scales - 32, found, 4)
    s = scales.int()
    nibbles = (s[:, :8] & 15) | (s[:, 8:] & 15) << 4
    pairs = s[:, 0:4] >> 4 | s[:, 4:8] >> 4 << 2 | s[:, 8:12] >> 4 << 4 | s[:, 12:16] >> 4 << 6
    fields = [_planes(codes >> 2, 1, 32), _planes(codes & 3, 2, 32), nibbles, pairs, as_bytes(d, torch.float16)]
    return join(len(x), fields)


def encode_q6_k(x: Tensor, importance: Tensor | None = None, searches: Searches = IN_TORCH) -> Tensor:
    """Sixteen sub-blocks: signed eight-bit scales, six-bit signed codes."""
    columns = _columns(x, 16)
    w = columns * columns if importance is None else _columns(importance.expand(len(x), -1), 16)
    scale, found = searches.search_symmetric(columns, w, 32)
    scale = scale.view(-1, 16)
    value = _largest(scale)
    is_zero = value.abs() < ZERO_MAGNITUDE
    inverse = over(-128, torch.where(is_zero, 1.0, value))
    scales = torch.where(is_zero, 0.0, nearest(inverse * scale).clamp(max=127))
    d = torch.where(is_zero, 0.0, over(1, inverse))[:, 0]
    codes = torch.where(is_zero, 0, _symmetric_codes(x, d, scales, found, 32))
    halves = codes.reshape(-1, 2, 4, 32)
    low = (halves[:, :, :2] & 15) | (halves[:, :, 2:] & 15) << 4
    fields = [low.flatten(1), _planes(codes >> 4, 2, 32), as_bytes(scales, torch.int8), as_bytes(d, torch.float16)]
    return join(len(x), fields)


def encode_q8_k(x: Tensor, _: Tensor | None = None) -> Tensor:
    """d * q with the value of largest magnitude at -127, and the sums of sixteen codes."""
    blocks = x.reshape(-1, _SUPER)
    value = _largest(blocks)
    inverse = over(-127, value)
    codes = torch.where(value != 0, nearest(inverse * blocks).clamp(max=127), 0.0)
    d = torch.where(value != 0, over(1, inverse), 0.0)
    sums = codes.view(-1, 16, 16).sum(-1)
    return join(len(x), [as_bytes(d, torch.float32), as_bytes(codes, torch.int8), as_bytes(sums, torch.int16)])
