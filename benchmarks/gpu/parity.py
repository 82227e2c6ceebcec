"""Whether the kernels give the right numbers here: short, and before anything is timed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.formats import BY_NAME
from kernels.gpu.dequantize import dequantize
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PLANAR
from kernels.gpu.quant_matmul import matmul
from kernels.reference.quant import dequantize as reference
from serve_app.attention import self_test
from serve_app.attention.choose import ORDER, usual_needs

PRODUCT_TOLERANCE = 2e-2
"""Of the largest result: products in bfloat16."""


@dataclass(frozen=True, slots=True)
class Check:
    """failure: None where all is right."""

    name: str
    failure: str | None


def check(device: torch.device) -> Iterator[Check]:
    """Every quantised type, decoded and multiplied in each regime, and every attention backend that can run here."""
    for name in PLANAR:
        yield Check(name, _product_failure(name, device))
    needs = usual_needs(device, torch.bfloat16)
    for candidate in ORDER:
        if candidate.make is not None and candidate.has_self_test and candidate.look(needs).is_usable:
            yield Check(f"attention, {candidate.name}", self_test.failure(candidate.make(needs), needs))


def _product_failure(name: str, device: torch.device) -> str | None:
    rows, columns = 48, 2 * PLANAR[name].block if PLANAR[name].block >= 256 else 256
    generator = torch.Generator().manual_seed(0)
    blocks = _random_blocks(name, rows, columns, generator)
    weights = reference(BY_NAME[name], blocks)
    matrix = PlanarMatrix.of(name, blocks.to(device))
    if not torch.equal(matrix.unpack().cpu(), blocks):
        return "planes do not give the blocks back"
    if not torch.equal(dequantize(matrix, torch.float32).cpu(), weights):
        return "decoded weights differ from the reference"
    for num in (1, 8, 17, 65):
        x = torch.randn(num, columns, generator=generator).bfloat16()
        exact = x.float() @ weights.T
        error = (matmul(matrix, x.to(device)).float().cpu() - exact).abs().max() / exact.abs().max()
        if not error <= PRODUCT_TOLERANCE:
            return f"the product with {num} rows is off by {error:.2g}"
    return None


def _random_blocks(name: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random bytes, but scales of a size between 0.5 and 2: sign and mantissa stay, the exponent is set."""
    form = BY_NAME[name]
    blocks = torch.randint(0, 256, (rows, form.row_bytes(columns)), dtype=torch.uint8, generator=generator)
    whole = blocks.view(rows, -1, form.block_bytes)
    for field, _ in form.fields:
        if field in ("d", "m", "dmin"):
            at = form.offset(field) + 1
            whole[..., at] = whole[..., at] & 0x83 | 0x38
        elif field in ("step", "zero"):  # float32
            at = form.offset(field) + 3
            whole[..., at] = whole[..., at] & 0x80 | 0x3F
    return blocks
