"""A layer's linears and norms by the checkpoint's names: what every family's constructor asks of its weights."""

from collections.abc import Sequence

import torch

from serve_app.layers.linear import Linear
from serve_app.layers.norm import Norm
from serve_app.layers.step import NormWeights
from serve_app.models.base import WeightSource


class LayerWeights:
    """The tensors of a checkpoint whose names begin with a prefix ("model.layers.3.")."""

    def __init__(self, weights: WeightSource, prefix: str = "") -> None:
        self.source = weights
        self._prefix = prefix

    def has(self, name: str) -> bool:
        """Whether the file has this tensor, its kind included ("self_attn.q_proj.bias")."""
        return self.source.has(self._prefix + name)

    def linear(self, names: Sequence[str], sizes: Sequence[int], in_features: int, has_bias: bool | None) -> Linear:
        """The named matrices [sizes[i], in_features] as one linear. has_bias: None = as the file's tensors show."""
        names = [self._prefix + name for name in names]
        if has_bias is None:
            has_bias = self.source.has(f"{names[0]}.bias")
        biases = [self.source.tensor(f"{n}.bias", (s,)) for n, s in zip(names, sizes, strict=True)] if has_bias else []
        weight = self.source.weight([f"{name}.weight" for name in names], sizes, in_features)
        return Linear(weight, torch.cat(biases) if biases else None)

    def rms_weights(self, name: str, width: int, epsilon: float, offset: float = 0.0) -> NormWeights:
        """An RMS norm's weight [width]."""
        return NormWeights(self.source.tensor(f"{self._prefix}{name}.weight", (width,)), epsilon, offset=offset)

    def rms_norm(self, name: str, width: int, epsilon: float, offset: float = 0.0) -> Norm:
        """An RMS norm over rows of the width."""
        return Norm(self.source.tensor(f"{self._prefix}{name}.weight", (width,)), epsilon, offset=offset)

    def layer_norm(self, name: str, width: int, epsilon: float) -> Norm:
        """A layer norm with bias over rows of the width."""
        weight, bias = (self.source.tensor(f"{self._prefix}{name}.{kind}", (width,)) for kind in ("weight", "bias"))
        return Norm(weight, epsilon, bias, is_layer_norm=True)
