"""A step that also shows what each matrix is multiplied with, for importance matrices."""

from collections.abc import Callable

from torch import Tensor

from serve_app.attention.backend import AttentionBackend
from serve_app.attention.device_batch import DeviceBatch
from serve_app.layers.torch_step import TorchStep
from serve_app.quant.experts import Experts
from serve_app.quant.weight import Weight

OnInput = Callable[[Weight | Experts, int, Tensor], None]
"""Called with a matrix, the number of the expert (0 for a plain one) and the rows [n, in] that it is about to meet."""


class CalibrationStep(TorchStep):
    """See Step. computes: False once only the inputs of what follows are wanted; products then have no columns."""

    def __init__(self, batch: DeviceBatch, backend: AttentionBackend, on_input: OnInput) -> None:
        super().__init__(batch, backend)
        self.computes = True
        self._on_input = on_input

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """See Step."""
        self._on_input(weight, 0, x)
        return super().linear(x, weight, bias) if self.computes else x.new_empty(len(x), 0)

    def expert_product(self, x: Tensor, part: Experts, expert: int) -> Tensor:
        """See TorchStep."""
        self._on_input(part, expert, x)
        return super().expert_product(x, part, expert)
