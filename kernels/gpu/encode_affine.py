"""The search for scale and minimum of a sub-block: kernels.reference.encode_search.search_affine."""

import triton
import triton.language as tl

from kernels.gpu.encode_math import minus_zero, nearest


@triton.jit
def _affine_loss(
    x, w, scale, minimum, inverse, base, keep, num_lanes,
    N: tl.constexpr, TOP: tl.constexpr, IS_ABSOLUTE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    total = minus_zero(LANES)
    for _ in range(N):
        xi = tl.load(x, mask=keep, other=0.0)
        error = scale * nearest(inverse * (xi - base), 0, TOP) + minimum - xi
        size = tl.abs(error) if IS_ABSOLUTE else error * error
        total += tl.load(w, mask=keep, other=0.0) * size
        x += num_lanes
        w += num_lanes
    return total


@triton.jit
def search_affine(
    x, w, out, num_lanes, first, step, count,
    N: tl.constexpr, TOP: tl.constexpr, IS_ABSOLUTE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out [4, sub-blocks]: scale, minimum, inverse, base."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    keep = lane < num_lanes
    x += lane
    w += lane
    sum_w = minus_zero(LANES)
    sum_x = minus_zero(LANES)
    least = tl.load(x, mask=keep, other=0.0)
    most = least
    for i in range(N):
        xi = tl.load(x + i * num_lanes, mask=keep, other=0.0)
        wi = tl.load(w + i * num_lanes, mask=keep, other=0.0)
        sum_w += wi
        sum_x += wi * xi
        least = tl.where(xi < least, xi, least)
        most = tl.where(xi > most, xi, most)
    least = tl.where(least > 0, 0.0, least)
    is_flat = most == least
    one = tl.full((LANES,), 1.0, tl.float32)
    best_inverse = tl.div_rn(one * TOP, tl.where(is_flat, 1.0, most - least))
    scale = tl.div_rn(one, best_inverse)
    minimum = least
    best_base = least
    best = _affine_loss(x, w, scale, least, best_inverse, least, keep, num_lanes, N, TOP, IS_ABSOLUTE, LANES)
    number = one * 0.0
    for _ in range(count + 1):
        base = minimum
        inverse = tl.div_rn(first + step * number + TOP, most - base)
        sum_q = minus_zero(LANES)
        sum_qq = minus_zero(LANES)
        sum_qx = minus_zero(LANES)
        for i in range(N):
            xi = tl.load(x + i * num_lanes, mask=keep, other=0.0)
            q = nearest(inverse * (xi - base), 0, TOP)
            wq = tl.load(w + i * num_lanes, mask=keep, other=0.0) * q
            sum_q += wq
            sum_qq += wq * q
            sum_qx += wq * xi
        spread = sum_w * sum_qq - sum_q * sum_q
        this_scale = tl.div_rn(sum_w * sum_qx - sum_x * sum_q, spread)
        this_minimum = tl.div_rn(sum_qq * sum_x - sum_q * sum_qx, spread)
        is_above = this_minimum > 0
        this_scale = tl.where(is_above, tl.div_rn(sum_qx, sum_qq), this_scale)
        this_minimum = tl.where(is_above, 0.0, this_minimum)
        loss = _affine_loss(x, w, this_scale, this_minimum, inverse, base, keep, num_lanes, N, TOP, IS_ABSOLUTE, LANES)
        is_better = (spread > 0) & (loss < best)
        best = tl.where(is_better, loss, best)
        scale = tl.where(is_better, this_scale, scale)
        minimum = tl.where(is_better, this_minimum, minimum)
        best_inverse = tl.where(is_better, inverse, best_inverse)
        best_base = tl.where(is_better, base, best_base)
        number += 1.0
    out += lane
    tl.store(out, tl.where(is_flat, 0.0, scale), mask=keep)
    tl.store(out + num_lanes, -1.0 * tl.where(is_flat, least, minimum), mask=keep)
    tl.store(out + 2 * num_lanes, tl.where(is_flat, 0.0, best_inverse), mask=keep)
    tl.store(out + 3 * num_lanes, best_base, mask=keep)
