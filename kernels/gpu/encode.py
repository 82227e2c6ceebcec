"""Encoders on a device, bytes equal to those of kernels.reference.encode. Which types there are: GPU_ENCODERS.

Simple types are one kernel. The others, and simple ones with importance, are the reference's own formulas in torch,
with the searches, which are nearly all of the work, as kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.formats import block_format
from kernels.gpu import encode_simple
from kernels.gpu.encode_search import IN_TRITON
from kernels.reference import encode_k
from kernels.reference import encode_simple as formulas
from kernels.reference.encode import checked

PIECE_WEIGHTS = 1 << 20
"""Weights that are encoded at a time; what is needed beside them are some 30 tensors' worth of four bytes each."""

_SEARCHED: dict[str, Callable[..., Tensor]] = {
    "Q4_0": formulas.encode_q4_0,
    "Q4_1": formulas.encode_q4_1,
    "Q5_0": formulas.encode_q5_0,
    "Q5_1": formulas.encode_q5_1,
    "Q2_K": encode_k.encode_q2_k,
    "Q3_K": encode_k.encode_q3_k,
    "Q4_K": encode_k.encode_q4_k,
    "Q5_K": encode_k.encode_q5_k,
    "Q6_K": encode_k.encode_q6_k,
}

GPU_ENCODERS = frozenset(_SEARCHED) | frozenset(encode_simple.ENCODERS)
"""The types that can be encoded on a device. HQQ is not among them: its solver looks at the whole matrix, and raises to
a power that no two libraries round alike."""


def encode(type_name: str, x: Tensor, importance: Tensor | None = None) -> Tensor:
    """x float32, float16 or bfloat16 [rows, columns] → uint8 [rows, bytes per row], both on one device.

    importance [columns], on any device. Errors are those of kernels.reference.encode; KeyError for a type that is not
    encoded here.
    """
    if importance is not None:
        importance = importance.to(x.device)
    return checked(type_name, x, importance, partial(_in_pieces, type_name))


def _in_pieces(type_name: str, x: Tensor, importance: Tensor | None) -> Tensor:
    columns = x.shape[1]
    out = torch.empty(len(x), block_format(type_name).row_bytes(columns), dtype=torch.uint8, device=x.device)
    step = max(1, PIECE_WEIGHTS // columns)
    encoder: Callable[..., Any] = _encoder(type_name, importance)
    for first in range(0, len(x), step):
        out[first : first + step] = encoder(x[first : first + step])
    return out


def _encoder(type_name: str, importance: Tensor | None) -> Callable[[Tensor], Tensor]:
    if type_name in encode_simple.ENCODERS and (importance is None or type_name not in _SEARCHED):
        return encode_simple.ENCODERS[type_name]
    return partial(_SEARCHED[type_name], importance=importance, searches=IN_TRITON)
