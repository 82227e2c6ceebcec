"""The kernels that the layers of one model call, chosen once for its device and dtype."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import dispatch


@dataclass(frozen=True, slots=True)
class LayerOps:
    """See kernels.reference.norm for what each does."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    silu_mul: Callable[[Tensor], Tensor]

    @classmethod
    def choose(cls, device: torch.device, dtype: torch.dtype) -> "LayerOps":
        """The best that kernels.dispatch has for tensors of this kind."""
        names = ("rms_norm", "add_rms_norm", "rope", "silu_mul")
        return cls(*(dispatch.choose(name, device, dtype).function for name in names))
