"""The linear layer of every family: a matrix in whatever form it is kept, and a bias."""

from torch import Tensor

from serve_app.layers.step import Rows, Step
from serve_app.quant.weight import Weight


class Linear:
    """y = x W^T + b. The step knows which request each token belongs to, for what is chosen per request (adapters)."""

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        """bias [out] of any float dtype, or None."""
        self.weight = weight
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: Rows, step: Step) -> Rows:
        """x [T, in] → [T, out]."""
        return step.linear(x, self.weight, self.bias)
