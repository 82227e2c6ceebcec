"""A model over its files' headers: every tensor is looked up and measured, none is read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from serve_app.loaders.checkpoint import Checkpoint, StoredTensor
from serve_app.loaders.weight_source import CheckpointSource
from serve_app.quant.experts import DenseExperts, Experts
from serve_app.quant.weight import DenseWeight, Weight


class HeaderSource(CheckpointSource):
    """Checks every tensor as the real source does, and gives tensors without data."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, torch.float32, torch.device("meta"))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See WeightSource."""
        self._note(name, [self._take(name, shape)], shape)
        return torch.empty(shape, device="meta")

    def weight(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> Weight:
        """See WeightSource."""
        for name, out in zip(names, out_features, strict=True):
            self._note(name, [self._take(name, (out, in_features))], (out, in_features))
        return DenseWeight(torch.empty((sum(out_features), in_features), device="meta"))

    def experts(self, name: str, num_experts: int, out_features: int, in_features: int) -> Experts:
        """See WeightSource."""
        shape = (num_experts, out_features, in_features)
        self._note(name.replace("{}.", ""), self._expert_parts(name, *shape), shape)
        return DenseExperts(torch.empty(shape, device="meta"))

    def _note(self, name: str, parts: Sequence[StoredTensor], shape: tuple[int, ...]) -> None:
        """Told of each, for who remembers them: that of experts without their number."""
