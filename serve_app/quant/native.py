"""The matrices behind a weight, as native programs multiply by them."""

from typing import TYPE_CHECKING

import torch

from kernels.formats import BY_NAME
from serve_app.quant.experts import DenseExperts, Experts, PackedExperts
from serve_app.quant.native_experts import NativeExperts
from serve_app.quant.native_weight import NativeWeight
from serve_app.quant.packed import PackedWeight
from serve_app.quant.weight import DenseWeight, FusedWeight, Weight

if TYPE_CHECKING:
    from kernels.cpu.packed import PackedMatrix

_TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def native_parts(weight: Weight) -> "list[PackedMatrix]":
    """The packed matrices that make up a weight, from its first rows to its last.

    Loaders make NativeWeights, whose matrices these are; others, made by hand, are packed into new memory.
    """
    from kernels.cpu.packed import PackedMatrix

    match weight:
        case NativeWeight():
            return [weight.matrix]
        case FusedWeight():
            return [matrix for part in weight.parts for matrix in native_parts(part)]
        case PackedWeight():
            return [PackedMatrix.of(weight.form.type_id, weight.blocks, weight.shape[1])]
        case DenseWeight():
            tensor = weight.dequantize().contiguous()
            type_id = BY_NAME[_TYPE_NAMES[tensor.dtype]].type_id
            return [PackedMatrix.of(type_id, tensor.view(torch.uint8), tensor.shape[1])]
        case _:
            raise AssertionError(f"{type(weight).__name__} has no native form")


def native_experts(experts: Experts) -> "PackedMatrix":
    """The experts' matrices one below the other, each filled up to whole tiles of 16 rows; see native_parts."""
    match experts:
        case NativeExperts():
            return experts.matrix
        case PackedExperts():
            form, blocks = experts.form, experts.blocks
        case DenseExperts():
            tensor = experts.tensor.contiguous()
            form, blocks = BY_NAME[_TYPE_NAMES[tensor.dtype]], tensor.view(torch.uint8)
        case _:
            raise AssertionError(f"{type(experts).__name__} have no native form")
    made = NativeExperts.empty(form.type_id, experts.num_experts, *experts.shape)
    for expert, rows in enumerate(blocks):
        made.pack(expert, 0, rows)
    return made.matrix
