"""Reads off a model which matrices it has, by running its forward over a step that computes nothing."""

from torch import Tensor

from serve_app.layers.shape_probe import ShapeProbe
from serve_app.layers.step import Activation, MixtureWeights, Routing, Rows
from serve_app.models.base import CausalLM
from serve_app.quant.experts import Experts
from serve_app.quant.native_weight import NativeWeight
from serve_app.quant.packed import PackedWeight
from serve_app.quant.weight import FusedWeight, Weight


class WeightProbe(ShapeProbe):
    """See Step. After a model's forward and logits: every matrix once."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, Weight | Experts] = {}

    @staticmethod
    def of(model: CausalLM) -> "WeightProbe":
        """What a model multiplies by or gathers from."""
        probe = WeightProbe()
        model.logits(model.forward(probe), probe)
        return probe

    @property
    def num_weights(self) -> int:
        """Numbers in all matrices."""
        return sum(getattr(w, "num_experts", 1) * w.shape[0] * w.shape[1] for w in self._found.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the matrices take in memory."""
        return sum(w.nbytes for w in self._found.values())

    @property
    def bits_per_weight(self) -> float:
        """Of the types, whatever else the memory is filled up with."""
        return 8 * sum(map(_type_bytes, self._found.values())) / self.num_weights

    def embed(self, weight: Weight, factor: float = 1.0) -> Rows:
        """See Step."""
        self._found[id(weight)] = weight
        return super().embed(weight, factor)

    def linear(self, x: Rows, weight: Weight, bias: Tensor | None) -> Rows:
        """See Step."""
        self._found[id(weight)] = weight
        return super().linear(x, weight, bias)

    def experts(self, x: Rows, weights: MixtureWeights, routing: Routing, activation: Activation) -> Rows:
        """See Step."""
        for matrix in (weights.router, weights.gate, weights.up, weights.down):
            self._found[id(matrix)] = matrix
        return super().experts(x, weights, routing, activation)


def _type_bytes(matrix: Weight | Experts) -> int:
    if isinstance(matrix, FusedWeight):
        return sum(map(_type_bytes, matrix.parts))
    if isinstance(matrix, NativeWeight | PackedWeight):
        rows, columns = matrix.shape
        return rows * matrix.form.row_bytes(columns)
    return matrix.nbytes
