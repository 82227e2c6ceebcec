"""The searches for scales that csrc/encode_search.h does, in plain torch: all sub-blocks side by side.

x and w are [n, sub-blocks] float32: sums run over the rows one after the other, so that every sub-block adds up in the
order of its weights and the bits agree with the native encoders'.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ZERO_MAGNITUDE = 1e-15
"""Below this a symmetric block counts as zeros."""

_MAGIC = 12582912.0


def nearest(x: Tensor) -> Tensor:
    """The nearest whole number as float32, halves to the even one; out of range as ggml has it; 0 for NaN."""
    bits = (x + _MAGIC).contiguous().view(torch.int32)
    # A processor chooses the bits of a NaN: those of x86 would come to 0 by themselves.
    return torch.where(x.isnan(), 0, (bits & 0x007FFFFF) - 0x00400000).float()


def over(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once: with a number on its left torch multiplies by the reciprocal."""
    return torch.full_like(x, number) / x


def by(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once: on a GPU torch multiplies by the reciprocal of a number on its right."""
    return x / torch.full_like(x, number)


def root(x: Tensor) -> Tensor:
    """The square root, rounded to the nearest: in float32 torch's own may be off by one in the last place."""
    return x.double().sqrt().float()


def running_sum(terms: Tensor) -> Tensor:
    """The sum over the first dimension, from its first to its last."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


@dataclass(frozen=True, slots=True)
class Affine:
    """x ~ scale * q - minimum, each [sub-blocks]. The search's codes are nearest(inverse * (x - base)), clamped."""

    scale: Tensor
    minimum: Tensor
    inverse: Tensor
    base: Tensor

    def codes(self, x: Tensor, top: int) -> Tensor:
        """The codes that the search found, [n, sub-blocks]."""
        return nearest(self.inverse * (x - self.base)).clamp(0, top)


def search_affine(
    x: Tensor, w: Tensor, top: int, first: float, step: float, count: int, *, is_absolute: bool = False
) -> Affine:
    """Least squares for scale and minimum under the codes of count + 1 inverse scales; what loses least is kept."""
    f32 = torch.tensor([first, step], dtype=torch.float32)
    sum_w, sum_x = running_sum(w), running_sum(w * x)
    least, most = x.gather(0, x.argmin(0, keepdim=True))[0], x.amax(0)  # of zeros of both signs the first
    least = torch.where(least > 0, 0.0, least)
    is_flat = most == least

    def lost(error: Tensor) -> Tensor:
        return running_sum(w * (error.abs() if is_absolute else error * error))

    inverse = over(top, torch.where(is_flat, torch.ones_like(most), most - least))
    scale, minimum = over(1, inverse), least
    best = lost(scale * nearest(inverse * (x - least)).clamp(0, top) + least - x)
    best_inverse, best_base = inverse, least
    for i in range(count + 1):
        base = minimum
        inverse = (f32[0] + f32[1] * i + top) / (most - base)
        q = nearest(inverse * (x - base)).clamp(0, top)
        wq = w * q
        sum_q, sum_qq, sum_qx = running_sum(wq), running_sum(wq * q), running_sum(wq * x)
        spread = sum_w * sum_qq - sum_q * sum_q
        this_scale = (sum_w * sum_qx - sum_x * sum_q) / spread
        this_minimum = (sum_qq * sum_x - sum_q * sum_qx) / spread
        is_above = this_minimum > 0
        this_scale = torch.where(is_above, sum_qx / sum_qq, this_scale)
        this_minimum = torch.where(is_above, 0.0, this_minimum)
        loss = lost(this_scale * q + this_minimum - x)
        is_better = (spread > 0) & (loss < best)
        best, scale = torch.where(is_better, loss, best), torch.where(is_better, this_scale, scale)
        minimum = torch.where(is_better, this_minimum, minimum)
        best_inverse, best_base = torch.where(is_better, inverse, best_inverse), torch.where(is_better, base, best_base)
    return Affine(
        torch.where(is_flat, 0.0, scale),
        torch.where(is_flat, -least, -minimum),
        torch.where(is_flat, 0.0, best_inverse),
        best_base,
    )


def _extreme(x: Tensor) -> tuple[Tensor, Tensor]:
    """The value of largest magnitude, the first of several (1 where it is too small to count), and whether it is."""
    index = x.abs().argmax(0, keepdim=True)
    value = x.gather(0, index)[0]
    is_zero = value.abs() < ZERO_MAGNITUDE
    return torch.where(is_zero, 1.0, value), is_zero


def search_symmetric(x: Tensor, w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """x ~ scale * q: the best of 19 scales. Returns scales [sub-blocks] and codes q + top, 0 where all are zeros."""
    value, is_zero = _extreme(x)
    tenth = torch.tensor(0.1, dtype=torch.float32)
    inverse = over(-top, value)
    wx = w * x

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        q = nearest(inverse * x).clamp(-top, top - 1)
        return running_sum(wx * q), running_sum(w * q * q)

    sum_qx, sum_qq = sums(inverse)
    scale = torch.where(sum_qq != 0, sum_qx / sum_qq, 0.0)
    best, best_inverse = scale * sum_qx, inverse
    for i in (*range(-9, 0), *range(1, 10)):
        inverse = -(top + tenth * i) / value
        sum_qx, sum_qq = sums(inverse)
        is_better = (sum_qq > 0) & (sum_qx * sum_qx > best * sum_qq)
        scale = torch.where(is_better, sum_qx / sum_qq, scale)
        best = torch.where(is_better, scale * sum_qx, best)
        best_inverse = torch.where(is_better, inverse, best_inverse)
    codes = nearest(best_inverse * x).clamp(-top, top - 1) + top
    return torch.where(is_zero, 0.0, scale), torch.where(is_zero, 0.0, codes)


def refine_symmetric(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """As search_symmetric, by moving one code at a time to its best place, five rounds at most; weights are x^2."""
    value, is_zero = _extreme(x)
    w = x * x
    wx = w * x
    codes = nearest(over(-top, value) * x).clamp(-top, top - 1)
    sum_qx, sum_qq = running_sum(wx * codes), running_sum(w * codes * codes)
    for _ in range(5):
        has_changed = False
        for i in range(len(x)):
            old = codes[i].clone()
            rest_qx, rest_qq = sum_qx - wx[i] * old, sum_qq - w[i] * old * old
            q = nearest(x[i] * rest_qq / rest_qx).clamp(-top, top - 1)
            is_open = (rest_qx > 0) & (q != old)
            rest_qx, rest_qq = rest_qx + wx[i] * q, rest_qq + w[i] * q * q
            is_better = is_open & (rest_qq > 0) & (rest_qx * rest_qx * sum_qq > sum_qx * sum_qx * rest_qq)
            codes[i] = torch.where(is_better, q, old)
            sum_qx, sum_qq = torch.where(is_better, rest_qx, sum_qx), torch.where(is_better, rest_qq, sum_qq)
            has_changed |= bool(is_better.any())
        if not has_changed:
            break
    scale = torch.where(is_zero | (sum_qq <= 0), 0.0, sum_qx / sum_qq)
    return scale, torch.where(is_zero, 0.0, codes + top)


def quantise_scales(x: Tensor, w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scales x >= 0 [n, blocks] as step * q: the best of nine steps, then up to five rounds of single moves.

    Returns the steps [blocks] and the codes [n, blocks], float32.
    """
    most = x.amax(0).clamp(min=0)
    is_zero = most < ZERO_MAGNITUDE
    most = torch.where(is_zero, 1.0, most)
    tenth = torch.tensor(0.1, dtype=torch.float32)

    def loss(inverse: Tensor, q: Tensor) -> Tensor:
        error = x - over(1, inverse) * q
        return running_sum(w * error * error)

    best_inverse = over(top, most)
    best = loss(best_inverse, nearest(best_inverse * x) % 256)
    for i in (-4, -3, -2, -1, 1, 2, 3, 4):
        inverse = (tenth * i + top) / most
        this = loss(inverse, nearest(inverse * x).clamp(max=top))
        best_inverse, best = torch.where(this < best, inverse, best_inverse), torch.where(this < best, this, best)
    codes = nearest(best_inverse * x).clamp(max=top)
    wx = w * x
    sum_qx, sum_qq = running_sum(wx * codes), running_sum(w * codes * codes)
    codes = codes % 256
    for _ in range(5):
        has_changed = False
        for i in range(len(x)):
            old = codes[i].clone()
            rest_qx, rest_qq = sum_qx - wx[i] * old, sum_qq - w[i] * old * old
            is_open = (rest_qx > 0) & (rest_qq > 0)
            q = nearest(x[i] * rest_qq / rest_qx).clamp(max=top)
            rest_qx, rest_qq = rest_qx + wx[i] * q, rest_qq + w[i] * q * q
            is_better = is_open & (q != old) & (rest_qx * rest_qx * sum_qq > sum_qx * sum_qx * rest_qq)
            codes[i] = torch.where(is_better, q % 256, old)
            sum_qx, sum_qq = torch.where(is_better, rest_qx, sum_qx), torch.where(is_better, rest_qq, sum_qq)
            has_changed |= bool(is_better.any())
        if not has_changed:
            break
    step = torch.where(is_zero | (sum_qq <= 0), 0.0, sum_qx / sum_qq)
    return step, torch.where(is_zero, 0.0, codes)


@dataclass(frozen=True, slots=True)
class Searches:
    """What an encoder needs of this file, by whatever computes it."""

    running_sum: Callable[[Tensor], Tensor]
    search_affine: Callable[..., Affine]
    search_symmetric: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    refine_symmetric: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    quantise_scales: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


IN_TORCH = Searches(running_sum, search_affine, search_symmetric, refine_symmetric, quantise_scales)
