"""A file's blocks taken apart into codes and scales, and put together again bit for bit."""

import torch
from torch import Tensor

from kernels.formats import BY_NAME
from kernels.gpu.planar_forms import BYTE_PAIR, Field, PlanarForm
from kernels.reference.quant_simple import bit_planes, field


def split(form: PlanarForm, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Rows uint8 [n, bytes per row] → low codes and high codes, uint8 [n, columns], bytes of the sub-blocks' scales
    and of the blocks', [n, bytes a row]; None where the type has none."""
    n, layout = len(rows), BY_NAME[form.name]
    columns = layout.row_length(rows.shape[1])
    blocks = rows.reshape(-1, layout.block_bytes)
    low = _codes(blocks, form, form.low).view(n, columns)
    high = None if form.high is None else _codes(blocks, form, form.high).view(n, columns)
    sub = _sub_scales(form, blocks)
    scales = torch.cat([field(blocks, form.name, name) for name in form.scales], dim=1)
    return low, high, None if sub is None else sub.reshape(n, -1), scales.reshape(n, -1)


def join(form: PlanarForm, low: Tensor, high: Tensor | None, sub: Tensor | None, scales: Tensor) -> Tensor:
    """The inverse of split: uint8 [n, bytes per row]."""
    n, layout = len(low), BY_NAME[form.name]
    num_blocks = low.numel() // form.block
    blocks = torch.empty(num_blocks, layout.block_bytes, dtype=torch.uint8, device=low.device)
    field(blocks, form.name, form.low.name).copy_(_merged(low.reshape(num_blocks, -1), form.low))
    if form.high is not None:
        assert high is not None
        field(blocks, form.name, form.high.name).copy_(_merged(high.reshape(num_blocks, -1), form.high))
    if sub is not None:
        packed = _packed_sub_scales(form, sub.reshape(num_blocks, -1))
        field(blocks, form.name, "scales").copy_(packed)
    by_name = scales.reshape(num_blocks, len(form.scales), -1).unbind(1)
    for name, numbers in zip(form.scales, by_name, strict=True):
        field(blocks, form.name, name).copy_(numbers)
    return blocks.view(n, -1)


def _codes(blocks: Tensor, form: PlanarForm, place: Field) -> Tensor:
    return bit_planes(field(blocks, form.name, place.name), place.bits, place.group).flatten(1)


def _merged(codes: Tensor, place: Field) -> Tensor:
    """The inverse of quant_simple.bit_planes."""
    per_byte = 8 // place.bits
    pieces = codes.view(len(codes), -1, per_byte, place.group)
    merged = torch.zeros_like(pieces[:, :, 0])
    for i in range(per_byte):
        merged |= pieces[:, :, i] << (place.bits * i)
    return merged.flatten(1)


def _sub_scales(form: PlanarForm, blocks: Tensor) -> Tensor | None:
    """Bytes of the sub-blocks' scales, in the order of the sub-blocks."""
    if form.sub_bytes == 0:
        return None
    packed = field(blocks, form.name, "scales")
    if form.sub == BYTE_PAIR:
        first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
        scale = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
        minimum = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
        return torch.stack((scale, minimum), dim=-1).flatten(1)
    if form.name == "Q3_K":  # six bits, less 32: as an int8
        low = bit_planes(packed[:, :8], 4, 8).flatten(1)
        high = bit_planes(packed[:, 8:], 2, 4).flatten(1)
        return (low | (high << 4)) - 32
    return packed


def _packed_sub_scales(form: PlanarForm, sub: Tensor) -> Tensor:
    """The inverse of _sub_scales."""
    if form.sub == BYTE_PAIR:
        scale, minimum = sub.view(len(sub), 8, 2).unbind(-1)
        low_scale, high_scale = scale[:, :4], scale[:, 4:]
        low_minimum, high_minimum = minimum[:, :4], minimum[:, 4:]
        first = low_scale | ((high_scale >> 4) << 6)
        second = low_minimum | ((high_minimum >> 4) << 6)
        return torch.cat((first, second, (high_scale & 15) | ((high_minimum & 15) << 4)), dim=1)
    if form.name == "Q3_K":
        scale = sub + 32
        low = _merged(scale & 15, Field("scales", 4, 8))
        return torch.cat((low, _merged(scale >> 4, Field("scales", 2, 4))), dim=1)
    return sub
