"""The matrices of a loaded model as bytes, whatever they are kept in."""

from typing import Any

import torch
from torch import Tensor

from serve_app.quant.experts import DenseExperts, Experts, PackedExperts
from serve_app.quant.native_experts import NativeExperts
from serve_app.quant.native_weight import NativeWeight
from serve_app.quant.packed import PackedWeight
from serve_app.quant.weight import FusedWeight, Weight


def matrices(thing: Any, path: str = "model", seen: set[int] | None = None) -> dict[str, tuple[str, Tensor]]:
    """Where each matrix is reached from → its type, and its blocks in file order."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, Tensor | str | int | float | type(None)):
        return {}
    seen.add(id(thing))
    if hasattr(thing, "expert") or (hasattr(thing, "matmul") and hasattr(thing, "dequantize")):
        return {f"{path}.{i}": found for i, found in enumerate(_parts(thing))}
    if isinstance(thing, list | tuple):
        children = {str(i): child for i, child in enumerate(thing)}
    else:
        slots = getattr(type(thing), "__slots__", ())
        children = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
        children |= getattr(thing, "__dict__", {})
    found: dict[str, tuple[str, Tensor]] = {}
    for name, child in children.items():
        found |= matrices(child, f"{path}.{name}", seen)
    return found


def _parts(weight: Weight | Experts) -> list[tuple[str, Tensor]]:
    match weight:
        case NativeWeight():
            return [(weight.form.name, weight.matrix.unpack())]
        case NativeExperts() | PackedExperts() | DenseExperts():
            return [part for e in range(weight.num_experts) for part in _parts(weight.expert(e))]
        case FusedWeight():
            return [part for each in weight.parts for part in _parts(each)]
        case PackedWeight():
            return [(weight.form.name, weight.blocks)]
        case _:
            assert hasattr(weight, "dequantize")
            return [("dense", weight.dequantize())]


def same(ours: Any, expected: Any) -> bool:
    """Whether two models have the same matrices, bit by bit."""
    found, wanted = matrices(ours), matrices(expected)
    assert found
    assert found.keys() == wanted.keys()
    return all(found[path][0] == wanted[path][0] and torch.equal(found[path][1], wanted[path][1]) for path in found)
