"""Quantised scales of a super-block: kernels.reference.encode_search.quantise_scales."""

import triton
import triton.language as tl

from kernels.gpu.encode_math import minus_zero, nearest_int


@triton.jit
def _scale_loss(x, w, inverse, keep, num_lanes, N: tl.constexpr, TOP: tl.constexpr, WRAPS: tl.constexpr,
                LANES: tl.constexpr):  # fmt: skip
    step = tl.div_rn(tl.full((LANES,), 1.0, tl.float32), inverse)
    total = minus_zero(LANES)
    for i in range(N):
        xi = tl.load(x + i * num_lanes, mask=keep, other=0.0)
        q = nearest_int(inverse * xi)
        q = (q & 255) if WRAPS else tl.minimum(q, TOP)
        error = xi - step * q.to(tl.float32)
        total += tl.load(w + i * num_lanes, mask=keep, other=0.0) * error * error
    return total


@triton.jit
def quantise_scales(x, w, out, codes, num_lanes, tenth, N: tl.constexpr, TOP: tl.constexpr, LANES: tl.constexpr):
    """As refine_symmetric, for scales that are not negative: codes are bytes, so that what is negative wraps."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    keep = lane < num_lanes
    x += lane
    w += lane
    codes += lane
    most = tl.full((LANES,), 0.0, tl.float32)
    for i in range(N):
        most = tl.maximum(most, tl.load(x + i * num_lanes, mask=keep, other=0.0))
    is_zero = most < 1e-15
    most = tl.where(is_zero, 1.0, most)
    best_inverse = tl.div_rn(tl.full((LANES,), TOP, tl.float32), most)
    best = _scale_loss(x, w, best_inverse, keep, num_lanes, N, TOP, True, LANES)
    number = tl.full((LANES,), -4.0, tl.float32)
    for _ in range(8):
        inverse = tl.div_rn(tenth * number + TOP, most)
        this = _scale_loss(x, w, inverse, keep, num_lanes, N, TOP, False, LANES)
        best_inverse = tl.where(this < best, inverse, best_inverse)
        best = tl.where(this < best, this, best)
        number = tl.where(number == -1.0, 1.0, number + 1.0)
    sum_qx = minus_zero(LANES)
    sum_qq = minus_zero(LANES)
    for i in range(N):
        xi = tl.load(x + i * num_lanes, mask=keep, other=0.0)
        wi = tl.load(w + i * num_lanes, mask=keep, other=0.0)
        code = tl.minimum(nearest_int(best_inverse * xi), TOP)
        q = code.to(tl.float32)
        sum_qx += wi * xi * q
        sum_qq += wi * q * q
        tl.store(codes + i * num_lanes, (code & 255).to(tl.float32), mask=keep)
    for _ in range(5):
        tl.debug_barrier()
        for i in range(N):
            xi = tl.load(x + i * num_lanes, mask=keep, other=0.0)
            wi = tl.load(w + i * num_lanes, mask=keep, other=0.0)
            old = tl.load(codes + i * num_lanes, mask=keep, other=0.0)
            rest_qx = sum_qx - wi * xi * old
            rest_qq = sum_qq - wi * old * old
            is_open = (rest_qx > 0) & (rest_qq > 0)
            code = tl.minimum(nearest_int(tl.div_rn(xi * rest_qq, rest_qx)), TOP)
            q = code.to(tl.float32)
            rest_qx = rest_qx + wi * xi * q
            rest_qq = rest_qq + wi * q * q
            is_better = is_open & (q != old) & (rest_qx * rest_qx * sum_qq > sum_qx * sum_qx * rest_qq)
            tl.store(codes + i * num_lanes, tl.where(is_better, (code & 255).to(tl.float32), old), mask=keep)
            sum_qx = tl.where(is_better, rest_qx, sum_qx)
            sum_qq = tl.where(is_better, rest_qq, sum_qq)
    tl.store(out + lane, tl.where(is_zero | (sum_qq <= 0), 0.0, tl.div_rn(sum_qx, sum_qq)), mask=keep)
    tl.debug_barrier()
    for i in range(N):
        q = tl.load(codes + i * num_lanes, mask=keep, other=0.0)
        tl.store(codes + i * num_lanes, tl.where(is_zero, 0.0, q), mask=keep)
