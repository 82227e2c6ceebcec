"""A WeightSource without numbers, which notes what a model asks of it."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from serve_app.quant.experts import DenseExperts, Experts
from serve_app.quant.weight import DenseWeight, Weight


class Asked:
    """published: the names that the checkpoint has. shapes: of what was asked for, each once, on the meta device."""

    def __init__(self, published: Collection[str]) -> None:
        self.published = published
        self.shapes: dict[str, tuple[int, ...]] = {}

    def _take(self, name: str, shape: tuple[int, ...]) -> None:
        assert name not in self.shapes
        self.shapes[name] = shape

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._take(name, shape)
        return torch.empty(shape, device="meta")

    def weight(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> Weight:
        for name, out in zip(names, out_features, strict=True):
            self._take(name, (out, in_features))
        return DenseWeight(torch.empty((sum(out_features), in_features), device="meta"))

    def experts(self, name: str, num_experts: int, out_features: int, in_features: int) -> Experts:
        for number in range(num_experts):
            self._take(name.format(number), (out_features, in_features))
        return DenseExperts(torch.empty((num_experts, out_features, in_features), device="meta"))

    def has(self, name: str) -> bool:
        return name in self.published
