"""What the card itself can do: the figures that all others are held against."""

from dataclasses import dataclass

import torch

from kernels.gpu.timing import Timer


@dataclass(frozen=True, slots=True)
class Limits:
    """bandwidth: bytes read and written a second by a copy. bf16_rate: multiplications and additions a second."""

    bandwidth: float
    bf16_rate: float


def measure(device: torch.device, copy_bytes: int = 2 << 30, side: int = 8192) -> Limits:
    """A copy of copy_bytes, and the library's product of two square bfloat16 matrices."""
    timer = Timer(device)
    return Limits(_bandwidth(timer, device, copy_bytes), _bf16_rate(timer, device, side))


def _bandwidth(timer: Timer, device: torch.device, copy_bytes: int) -> float:
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * copy_bytes / timer(lambda: target.copy_(source))


def _bf16_rate(timer: Timer, device: torch.device, side: int) -> float:
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in "ab")
    return float(2 * side**3) / timer(lambda: a @ b)
