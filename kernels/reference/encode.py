"""Encoders of block types in plain torch: the oracle of the native ones, and what runs without a compiler."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.formats import BlockFormat, block_format
from kernels.reference import encode_k, encode_own, encode_simple

Encoder = Callable[[Tensor, Tensor | None], Tensor]
"""x float32 [rows, columns], neither of them 0, and importance → uint8 [rows, bytes per row]."""

_ENCODERS: dict[str, Encoder] = {
    "F32": encode_simple.encode_f32,
    "F16": encode_simple.encode_f16,
    "BF16": encode_simple.encode_bf16,
    "Q4_0": encode_simple.encode_q4_0,
    "Q4_1": encode_simple.encode_q4_1,
    "Q5_0": encode_simple.encode_q5_0,
    "Q5_1": encode_simple.encode_q5_1,
    "Q8_0": encode_simple.encode_q8_0,
    "Q8_1": encode_simple.encode_q8_1,
    "MXFP4": encode_simple.encode_mxfp4,
    "Q2_K": encode_k.encode_q2_k,
    "Q3_K": encode_k.encode_q3_k,
    "Q4_K": encode_k.encode_q4_k,
    "Q5_K": encode_k.encode_q5_k,
    "Q6_K": encode_k.encode_q6_k,
    "Q8_K": encode_k.encode_q8_k,
    "FP8": encode_own.encode_fp8,
    "HQQ4": encode_own.encode_hqq4,
    "HQQ8": encode_own.encode_hqq8,
}

ENCODABLE = frozenset(_ENCODERS)
"""The types that there are encoders for."""

HQQ_TYPES = frozenset({"HQQ4", "HQQ8"})
HQQ_LIMIT = 2.0**126
"""From here on the span of a group may be more than float32 holds."""

_HALF_SCALES = ("d", "m", "dmin", "s", "value")


def encode(type_name: str, x: Tensor, importance: Tensor | None = None) -> Tensor:
    """x float32 [rows, columns] → uint8 [rows, bytes per row].

    importance float32 [columns], not negative: how much the errors of a column count. ValueError for a value that is
    not finite, for a scale that float16 does not hold, for rows that are no whole number of blocks; KeyError for a type
    without an encoder. HQQ looks at the whole of x at once.
    """
    return checked(type_name, x, importance, _ENCODERS[type_name])


def checked(type_name: str, x: Tensor, importance: Tensor | None, encoder: Encoder) -> Tensor:
    """What an encoder makes of x, on any device, with the refusals of `encode`."""
    form = block_format(type_name)
    rows, columns = x.shape
    check_sizes(form, columns, importance)
    if rows == 0 or columns == 0:
        return torch.empty((rows, form.row_bytes(columns)), dtype=torch.uint8, device=x.device)
    bad = ~torch.isfinite(x).all(1)
    if bad.any():
        refuse(form, 1, int(bad.nonzero()[0, 0]))
    if type_name in HQQ_TYPES:
        bad = x.abs().amax(1) >= HQQ_LIMIT
        if bad.any():
            refuse(form, 2, int(bad.nonzero()[0, 0]))
    out = encoder(x.float(), None if importance is None else importance.float())
    blocks = out.view(rows, -1, form.block_bytes)
    for name, size in form.fields:
        if size == 2 and name in _HALF_SCALES and type_name != "BF16":
            start = form.offset(name)
            halves = blocks[..., start : start + 2].contiguous().view(torch.float16)
            bad = ~torch.isfinite(halves).flatten(1).all(1)
            if bad.any():
                refuse(form, 2, int(bad.nonzero()[0, 0]))
    return out


def check_sizes(form: BlockFormat, columns: int, importance: Tensor | None) -> None:
    """ValueError where rows are no whole number of blocks, or the importance does not fit them or is no importance."""
    form.row_bytes(columns)
    if importance is None:
        return
    if importance.shape != (columns,):
        raise ValueError(f"importance has shape {list(importance.shape)}, not one value for each of {columns} columns")
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ValueError("importance must be finite and not negative")


def refuse(form: BlockFormat, reason: int, row: int) -> None:
    """Raises for the reasons 1 and 2 of the native encoders."""
    if reason == 1:
        raise ValueError(f"row {row} has a value that is not finite")
    if reason == 2:
        limit = "groups end at 2^126" if form.name in HQQ_TYPES else "a float16 scale ends at 65504"
        raise ValueError(f"row {row} has values too large for {form.name}: {limit}")
