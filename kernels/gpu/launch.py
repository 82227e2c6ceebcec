"""What every launch of a kernel needs to know: where it runs, and its dtypes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Triton decides when kernels are defined: with TRITON_INTERPRET=1 they run on the CPU, slowly."""

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""Of activations."""


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What matrices are multiplied in: their own type, but for bfloat16, which the interpreter cannot."""
    return tl.float32 if IS_INTERPRETED and dtype == torch.bfloat16 else DTYPES[dtype]


def require_device(tensor: Tensor) -> None:
    """A launch on a CPU tensor outside the interpreter would end the process."""
    assert IS_INTERPRETED or tensor.device.type == "cuda", f"a Triton kernel cannot run on {tensor.device}"


def plane_or(plane: Tensor | None, other: Tensor) -> Tensor:
    """A plane, or for one that there is not any address, which is never read."""
    return other if plane is None else plane
