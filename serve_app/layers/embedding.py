"""Token ids to vectors, and vectors to logits."""

from torch import Tensor

from serve_app.layers.step import Rows, Step
from serve_app.quant.weight import Weight


class Embedding:
    """Rows of a matrix [vocab, hidden] by token id."""

    def __init__(self, weight: Weight, factor: float = 1.0) -> None:
        """factor: what every row is multiplied with."""
        self.weight = weight
        self._factor = factor

    def __call__(self, step: Step) -> Rows:
        """The step's tokens → new rows [T, hidden]."""
        return step.embed(self.weight, self._factor)


class OutputHead:
    """Hidden states to logits, by a matrix of its own or the embedding's (tied)."""

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        """weight [vocab, hidden]; bias [vocab] float32 or None."""
        self.weight = weight
        self._bias = bias

    def __call__(self, hidden: Rows, step: Step) -> Rows:
        """hidden [L, hidden] → [L, vocab]."""
        return step.linear(hidden, self.weight, self._bias)
