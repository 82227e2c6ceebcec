"""Dequantisation of every block type in plain torch: the oracle of the native and GPU kernels, and their fallback."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.formats import BlockFormat, block_format
from kernels.reference import quant_iq, quant_k, quant_own, quant_simple

_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": quant_simple.decode_f32,
    "F16": quant_simple.decode_f16,
    "BF16": quant_simple.decode_bf16,
    "Q4_0": quant_simple.decode_q4_0,
    "Q4_1": quant_simple.decode_q4_1,
    "Q5_0": quant_simple.decode_q5_0,
    "Q5_1": quant_simple.decode_q5_1,
    "Q8_0": quant_simple.decode_q8_0,
    "Q2_K": quant_k.decode_q2_k,
    "Q3_K": quant_k.decode_q3_k,
    "Q4_K": quant_k.decode_q4_k,
    "Q5_K": quant_k.decode_q5_k,
    "Q6_K": quant_k.decode_q6_k,
    "IQ1_S": quant_iq.decode_iq1_s,
    "IQ1_M": quant_iq.decode_iq1_m,
    "IQ2_XXS": quant_iq.decode_iq2_xxs,
    "IQ2_XS": quant_iq.decode_iq2_xs,
    "IQ2_S": quant_iq.decode_iq2_s,
    "IQ3_XXS": quant_iq.decode_iq3_xxs,
    "IQ3_S": quant_iq.decode_iq3_s,
    "IQ4_NL": quant_simple.decode_iq4_nl,
    "IQ4_XS": quant_iq.decode_iq4_xs,
    "TQ1_0": quant_simple.decode_tq1_0,
    "TQ2_0": quant_simple.decode_tq2_0,
    "MXFP4": quant_simple.decode_mxfp4,
    "NVFP4": quant_simple.decode_nvfp4,
    "Q8_1": quant_own.decode_q8_1,
    "Q8_K": quant_own.decode_q8_k,
    "FP8": quant_own.decode_fp8,
    "HQQ4": quant_own.decode_hqq4,
    "HQQ8": quant_own.decode_hqq8,
}


def dequantize(block_type: str | int | BlockFormat, blocks: Tensor) -> Tensor:
    """Decodes packed rows exactly as ggml's reference code does.

    block_type: name, GGML type id or format; blocks [rows, bytes per row] uint8, any device, contiguous. Returns
    [rows, weights per row] float32, freshly allocated. Raises KeyError for a type that cannot be decoded, ValueError
    for rows that are no whole number of blocks.
    """
    form = block_type if isinstance(block_type, BlockFormat) else block_format(block_type)
    decode = _DECODERS[form.name]
    rows, row_bytes = blocks.shape
    length = form.row_length(row_bytes)
    if rows == 0 or length == 0:
        return torch.empty(rows, length, dtype=torch.float32, device=blocks.device)
    if form.block_length == 1:
        return decode(blocks)
    return decode(blocks.view(-1, form.block_bytes)).view(rows, length)
