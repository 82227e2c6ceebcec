"""What every launch of a Triton kernel needs to know: where it runs."""

import os

import torch
import triton
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton decides when kernels are imported: with TRITON_INTERPRET=1 they run on the CPU, slowly, operation by operation."""

DTYPES = {torch.float32: triton.language.float32, torch.float16: triton.language.float16,
          torch.bfloat16: triton.language.bfloat16}  # fmt: skip
"""Of activations."""


def require_device(tensor: Tensor) -> None:
    """A launch on a CPU tensor outside the interpreter would end the process."""
    assert IS_INTERPRETED or tensor.device.type == "cuda", f"a Triton kernel cannot run on {tensor.device}"
