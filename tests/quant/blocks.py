"""Random packed rows."""

import torch
from torch import Tensor

from kernels.formats import BY_NAME
from kernels.reference.encode import encode

DECODABLE = sorted(name for name, form in BY_NAME.items() if form.is_decodable)
IN_FEATURES = 512
OURS = ("Q8_1", "Q8_K", "FP8", "HQQ4", "HQQ8")
"""Types with float32 scales: random bits would be of any size."""


def random_blocks(name: str, rows: int, seed: int = 0) -> Tensor:
    """Random packed rows whose scales are of a size as in real weights."""
    form = BY_NAME[name]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, form.row_bytes(IN_FEATURES)), dtype=torch.uint8, generator=generator)
    if form.block_length == 1:
        values = torch.randn(rows, IN_FEATURES, generator=generator)
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        return values.to(dtype).view(torch.uint8)
    if name in OURS:
        return encode(name, torch.randn(rows, IN_FEATURES, generator=generator))
    view = blocks.view(-1, form.block_bytes)
    for field, size in form.fields:
        if field in ("d", "dmin", "m") and size == 2:
            view[:, form.offset(field) + 1] = (view[:, form.offset(field) + 1] & 0x83) | 0x20
    if name == "IQ1_M":  # the top nibble of the last scale word holds the exponent's high bits
        view[:, -1] = (view[:, -1] & 0x0F) | 0x20
    if name == "MXFP4":
        view[:, 0] = 120
    return blocks
