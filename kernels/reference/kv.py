"""Rows of 8-bit KV caches in plain torch: the oracle of the native ones (csrc/kv.h)."""

import torch
from torch import Tensor

BLOCK = 32


def q8_row_bytes(head_dim: int) -> int:
    """Bytes of one head's row: head_dim int8, then a float16 scale for each 32 of them."""
    return head_dim + 2 * -(-head_dim // BLOCK)


def encode_q8(x: Tensor) -> Tensor:
    """x [..., D] → uint8 [..., q8_row_bytes(D)].

    A block's scale is its largest magnitude / 127, rounded up to float16, so that no value is off by more than half a
    scale: |x - decoded| <= largest / 254 * (1 + 2**-10) + 2**-25. A block with NaN or infinity decodes to NaN.
    """
    head_dim = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -head_dim % BLOCK))
    padded = padded.reshape(*x.shape[:-1], -1, BLOCK)
    largest = padded.abs().amax(-1)
    scale = (largest / 127.0).half()
    scale = torch.where(scale.float() * 127.0 < largest, (scale.view(torch.int16) + 1).view(torch.float16), scale)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    inverse = torch.where(largest.isfinite() & (scale > 0), 1.0 / scale.float(), 0.0)
    q = (padded.nan_to_num(0.0, 0.0, 0.0) * inverse.unsqueeze(-1)).round().to(torch.int8)
    return torch.cat((q.flatten(-2)[..., :head_dim].view(torch.uint8), scale.contiguous().view(torch.uint8)), dim=-1)


def decode_q8(rows: Tensor, head_dim: int) -> Tensor:
    """uint8 [..., q8_row_bytes(D)] → float32 [..., D]."""
    scales = rows[..., head_dim:].clone(memory_format=torch.contiguous_format).view(torch.float16)
    scale = scales.float().repeat_interleave(BLOCK, dim=-1)
    return rows[..., :head_dim].contiguous().view(torch.int8).float() * scale[..., :head_dim]
