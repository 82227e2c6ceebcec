"""The linear layer of every family: a matrix in whatever form it is kept, and a bias."""

from torch import Tensor

from serve_app.batch import ForwardBatch
from serve_app.quant.weight import Weight


class Linear:
    """y = x W^T + b. The batch says which request each token belongs to, for what is chosen per request (adapters)."""

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        """bias [out] of any float dtype, or None."""
        self.weight = weight
        self.bias = None if bias is None else bias.to(weight.dtype)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, in] → [T, out]."""
        y = self.weight.matmul(x)
        return y if self.bias is None else y.add_(self.bias)
