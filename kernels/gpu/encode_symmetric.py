"""The searches for the scale of a symmetric sub-block: kernels.reference.encode_search has the same."""

import triton
import triton.language as tl

from kernels.gpu.encode_math import minus_zero, nearest


@triton.jit
def _extreme(x, keep, num_lanes, N: tl.constexpr, LANES: tl.constexpr):
    """The value of largest magnitude, the first of several; 1 where it is too small to count; and whether it is."""
    value = tl.load(x, mask=keep, other=0.0)
    for i in range(1, N):
        xi = tl.load(x + i * num_lanes, mask=keep, other=0.0)
        value = tl.where(tl.abs(xi) > tl.abs(value), xi, value)
    is_zero = tl.abs(value) < 1e-15
    return tl.where(is_zero, 1.0, value), is_zero


@triton.jit
def _symmetric_sums(x, w, inverse, keep, num_lanes, N: tl.constexpr, TOP: tl.constexpr, LANES: tl.constexpr):
    sum_qx = minus_zero(LANES)
    sum_qq = minus_zero(LANES)
    for i in range(N):
        xi = tl.load(x + i * num_lanes, mask=keep, other=0.0)
        wi = tl.load(w + i * num_lanes, mask=keep, other=0.0)
        q = nearest(inverse * xi, -TOP, TOP - 1)
        sum_qx += wi * xi * q
        sum_qq += wi * q * q
    return sum_qx, sum_qq


@triton.jit
def search_symmetric(
    x, w, out, codes, num_lanes, tenth, N: tl.constexpr, TOP: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """out [sub-blocks]: scales; codes [n, sub-blocks]."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    keep = lane < num_lanes
    x += lane
    w += lane
    codes += lane
    value, is_zero = _extreme(x, keep, num_lanes, N, LANES)
    best_inverse = tl.div_rn(tl.full((LANES,), -TOP, tl.float32), value)
    sum_qx, sum_qq = _symmetric_sums(x, w, best_inverse, keep, num_lanes, N, TOP, LANES)
    scale = tl.where(sum_qq != 0, tl.div_rn(sum_qx, sum_qq), 0.0)
    best = scale * sum_qx
    number = tl.full((LANES,), -9.0, tl.float32)
    for _ in range(18):
        inverse = tl.div_rn(-1.0 * (TOP + tenth * number), value)
        sum_qx, sum_qq = _symmetric_sums(x, w, inverse, keep, num_lanes, N, TOP, LANES)
        is_better = (sum_qq > 0) & (sum_qx * sum_qx > best * sum_qq)
        scale = tl.where(is_better, tl.div_rn(sum_qx, sum_qq), scale)
        best = tl.where(is_better, scale * sum_qx, best)
        best_inverse = tl.where(is_better, inverse, best_inverse)
        number = tl.where(number == -1.0, 1.0, number + 1.0)
    tl.store(out + lane, tl.where(is_zero, 0.0, scale), mask=keep)
    for i in range(N):
        q = nearest(best_inverse * tl.load(x + i * num_lanes, mask=keep, other=0.0), -TOP, TOP - 1) + TOP
        tl.store(codes + i * num_lanes, tl.where(is_zero, 0.0, q), mask=keep)


@triton.jit
def refine_symmetric(x, out, codes, num_lanes, N: tl.constexpr, TOP: tl.constexpr, LANES: tl.constexpr):
    """As search_symmetric; codes are moved where they lie, each by the thread that wrote it."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    keep = lane < num_lanes
    x += lane
    codes += lane
    value, is_zero = _extreme(x, keep, num_lanes, N, LANES)
    inverse = tl.div_rn(tl.full((LANES,), -TOP, tl.float32), value)
    sum_qx = minus_zero(LANES)
    sum_qq = minus_zero(LANES)
    for i in range(N):
        xi = tl.load(x + i * num_lanes, mask=keep, other=0.0)
        q = nearest(inverse * xi, -TOP, TOP - 1)
        sum_qx += xi * xi * xi * q
        sum_qq += xi * xi * q * q
        tl.store(codes + i * num_lanes, q, mask=keep)
    for _ in range(5):
        tl.debug_barrier()
        for i in range(N):
            xi = tl.load(x + i * num_lanes, mask=keep, other=0.0)
            old = tl.load(codes + i * num_lanes, mask=keep, other=0.0)
            w = xi * xi
            rest_qx = sum_qx - w * xi * old
            rest_qq = sum_qq - w * old * old
            q = nearest(tl.div_rn(xi * rest_qq, rest_qx), -TOP, TOP - 1)
            is_open = (rest_qx > 0) & (q != old)
            rest_qx = rest_qx + w * xi * q
            rest_qq = rest_qq + w * q * q
            is_better = is_open & (rest_qq > 0) & (rest_qx * rest_qx * sum_qq > sum_qx * sum_qx * rest_qq)
            tl.store(codes + i * num_lanes, tl.where(is_better, q, old), mask=keep)
            sum_qx = tl.where(is_better, rest_qx, sum_qx)
            sum_qq = tl.where(is_better, rest_qq, sum_qq)
    scale = tl.where(is_zero | (sum_qq <= 0), 0.0, tl.div_rn(sum_qx, sum_qq))
    tl.store(out + lane, scale, mask=keep)
    tl.debug_barrier()
    for i in range(N):
        q = tl.load(codes + i * num_lanes, mask=keep, other=0.0) + TOP
        tl.store(codes + i * num_lanes, tl.where(is_zero, 0.0, q), mask=keep)
