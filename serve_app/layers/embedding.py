"""Token ids to vectors, and vectors to logits."""

from torch import Tensor

from serve_app.batch import ForwardBatch
from serve_app.quant.weight import Weight


class Embedding:
    """Rows of a matrix [vocab, hidden] by token id."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """The step's tokens → a new tensor [T, hidden]."""
        return self.weight.rows(batch.token_ids)


class OutputHead:
    """Hidden states to logits, by a matrix of its own or the embedding's (tied)."""

    def __init__(self, weight: Weight) -> None:
        """weight [vocab, hidden]."""
        self.weight = weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [L, hidden] → float32 [L, vocab]."""
        return self.weight.matmul(hidden).float()
