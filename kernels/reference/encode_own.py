"""Encoders of FP8 and HQQ: [rows, columns] float32 → [rows, bytes per row] uint8.

HQQ: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023, and the solver of their
package with beta growing (releases 0.2.7 to 0.2.8.post1 left it constant by mistake).
"""

import torch
from torch import Tensor

from kernels.reference.encode_search import over
from kernels.reference.encode_simple import as_bytes, join

HQQ_GROUP = 64
_PASSES, _BETA, _KAPPA, _NORM = 20, 10.0, 1.01, 0.7


def encode_fp8(x: Tensor, _: Tensor | None = None) -> Tensor:
    """d * an E4M3 number, the largest magnitude of 128 at 448."""
    blocks = x.reshape(-1, 128)
    d = blocks.abs().amax(1, keepdim=True) / 448
    codes = (blocks / torch.where(d == 0, 1.0, d)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return join(len(x), [as_bytes(d, torch.float32), codes.view(torch.uint8)])


def solve_hqq(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [groups, 64], inverse steps and zeros [groups, 1] of x float32: x ~ (code - zero) / inverse.

    The norm |x - decoded|^0.7 is made small by moving the zeros alone. Ends after 20 passes, or when the mean error of
    all of x stops falling.
    """
    top = (1 << bits) - 1
    w = x.reshape(-1, HQQ_GROUP)
    least, most = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    inverse = torch.where(most - least <= 1e-4, 1.0, over(top, most - least).clamp(max=2e4))
    zero, beta, best = -least * inverse, _BETA, 1e4
    for _ in range(_PASSES):
        q = (w * inverse + zero).round().clamp(0, top)
        error = w - (q - zero) / inverse
        size = error.abs()
        shrunk = error.sign() * (size - size.pow(_NORM - 1) / beta).clamp(min=0)
        zero = (q - (w - shrunk) * inverse).mean(1, keepdim=True)
        beta *= _KAPPA
        mean = float(size.double().mean())
        if mean >= best:
            break
        best = mean
    return (w * inverse + zero).round().clamp(0, top), inverse, zero


def encode_hqq4(x: Tensor, _: Tensor | None = None) -> Tensor:
    """Step, zero, nibbles."""
    q, inverse, zero = solve_hqq(x, 4)
    codes = q.int()
    nibbles = codes[:, :32] | codes[:, 32:] << 4
    return join(len(x), [as_bytes(over(1, inverse), torch.float32), as_bytes(zero, torch.float32), nibbles])


def encode_hqq8(x: Tensor, _: Tensor | None = None) -> Tensor:
    """Step, zero, bytes."""
    q, inverse, zero = solve_hqq(x, 8)
    return join(len(x), [as_bytes(over(1, inverse), torch.float32), as_bytes(zero, torch.float32), q])
