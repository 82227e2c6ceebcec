"""HQQ's weights: codes of four or eight bits, a scale and a zero for every 64 of a row's neighbouring weights.

weight = (code - zero) * scale, in float32. Groups lie along the input columns (axis 1 in HQQ's words). Source: the
paper "Half-Quadratic Quantization of Large Machine Learning Models" (Badri and Shaji, 2023); which codes and zeros to
take for given weights is the quantiser's affair.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

GROUP: Final = 64
"""Weights that share a scale and a zero."""

BITS: Final = (4, 8)


@dataclass(frozen=True, slots=True)
class HqqTensor:
    """A matrix [rows, columns].

    bits: 4 or 8. codes uint8 [rows, columns * bits / 8]: with 4 bits, weight 2 i is in the lower half of byte i and
    weight 2 i + 1 in the upper one. scale, zero float16 [rows, columns / 64]. All contiguous, on one device.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __post_init__(self) -> None:
        """ValueError for parts that do not fit each other."""
        if self.bits not in BITS:
            raise ValueError(f"HQQ weights have {' or '.join(map(str, BITS))} bits, not {self.bits}")
        rows, columns = self.shape
        if columns % GROUP:
            raise ValueError(f"{columns} columns are no whole number of HQQ groups of {GROUP}")
        groups = (rows, columns // GROUP)
        if self.scale.shape != groups or self.zero.shape != groups:
            raise ValueError(
                f"HQQ scales {list(self.scale.shape)} and zeros {list(self.zero.shape)} are not {list(groups)}"
            )
        if self.codes.dtype != torch.uint8 or {self.scale.dtype, self.zero.dtype} != {torch.float16}:
            raise ValueError("HQQ codes are uint8, scales and zeros float16")

    @staticmethod
    def of(bits: int, codes: Tensor, scale: Tensor, zero: Tensor) -> "HqqTensor":
        """From codes uint8 [rows, columns], one a byte, less than 2^bits; scale and zero are rounded to float16."""
        packed = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
        return HqqTensor(bits, packed.contiguous(), scale.half().contiguous(), zero.half().contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def unpacked_codes(self) -> Tensor:
        """uint8 [rows, columns], one a byte."""
        if self.bits == 8:
            return self.codes
        return torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(1)

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        rows, columns = self.shape
        codes = self.unpacked_codes().view(rows, columns // GROUP, GROUP).float()
        return ((codes - self.zero.float().unsqueeze(-1)) * self.scale.float().unsqueeze(-1)).view(rows, columns)
