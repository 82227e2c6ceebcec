"""Token ids to vectors, and vectors to logits."""

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

    def __init__(self, weight: Weight) -> None:
        """weight [vocab, hidden]."""
        self.weight = weight

    def __call__(self, hidden: Rows, step: Step) -> Rows:
        """hidden [L, hidden] → [L, vocab]."""
        return step.linear(hidden, self.weight, None)
