"""What the tests of the matmul family work on: random rows of every type, and what 8 bits make of activations."""

import torch
from torch import Tensor

from kernels.formats import BY_NAME, BlockFormat
from kernels.reference.encode import encode

TYPES = sorted(name for name, form in BY_NAME.items() if form.is_decodable)
Q8_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
Q8_256 = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
QUANTISED = (*Q8_32, *Q8_256)
"""Types whose activations are rounded to 8 bits, with a scale for 32 or for 256 of them."""

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALES = {"d", "m", "dmin"}
_FLOAT32_SCALES = {"Q8_1", "Q8_K", "FP8", "HQQ4", "HQQ8"}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def any_blocks(form: BlockFormat, rows: int, columns: int, seed: int = 0) -> Tensor:
    """uint8 [rows, bytes per row] of any bits."""
    return torch.randint(0, 256, (rows, form.row_bytes(columns)), dtype=torch.uint8, generator=_generator(seed))


def usual_blocks(name: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """uint8 [rows, bytes per row] whose weights are finite and of about the same size."""
    form = BY_NAME[name]
    if name in _PLAIN:
        weights = torch.randn(rows, columns, generator=_generator(seed)).to(_PLAIN[name])
        return weights.view(torch.uint8) if columns else torch.empty(rows, 0, dtype=torch.uint8)
    if name in _FLOAT32_SCALES:
        return encode(name, torch.randn(rows, columns, generator=_generator(seed)) * 0.01)
    blocks = any_blocks(form, rows, columns, seed)
    view = blocks.view(rows, -1, form.block_bytes)
    for field, size in form.fields:
        at = form.offset(field)
        if field in _SCALES and size == 2:
            scales = (torch.rand(view.shape[:2], generator=_generator(seed + 1)) + 0.5).mul(0.01).half()
            view[..., at : at + 2] = scales.unsqueeze(-1).view(torch.uint8)
    if name == "MXFP4":
        view[..., 0] = view[..., 0] % 8 + 120
    if name == "NVFP4":
        view[..., :4] = view[..., :4] % 64
    if name == "IQ1_M":  # a float16 spread over the top nibbles of four words: its upper one is in the last byte
        view[..., 55] = view[..., 55] & 15 | 0x20
    return blocks


def randn(*shape: int, seed: int = 0) -> Tensor:
    """float32 normal numbers."""
    return torch.randn(*shape, generator=_generator(seed))


def rounded_to_8_bits(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """What a product reads of float32 x [T, columns]: q * scale, and each element's scale; both float64 [T, columns].

    scale = largest magnitude of the block / 127, q = x / scale rounded to even. So |x - q * scale| <= scale / 2, but
    for the rounding of x / scale itself: 2^-23 of 127.
    """
    tokens, columns = x.shape
    num_blocks = -(-columns // block)
    padded = torch.zeros(tokens, num_blocks * block)
    padded[:, :columns] = x
    blocks = padded.view(tokens, num_blocks, block)
    top = blocks.abs().amax(-1, keepdim=True)
    # A division of tensors: a number divided by a tensor is multiplied by its rounded inverse.
    inverse = torch.where(top > 1e-36, torch.tensor(127.0) / top, torch.zeros_like(top))
    q = (blocks * inverse).round()
    scale = (top / 127.0).expand_as(blocks)
    return (q.double() * scale).reshape(padded.shape)[:, :columns], scale.reshape(padded.shape)[:, :columns].double()
