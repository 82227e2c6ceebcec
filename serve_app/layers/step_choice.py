"""Which step carries a model's operations out, where no native program does."""

import torch

from kernels.gpu.support import triton_support
from serve_app.layers.torch_step import TorchStep


def step_type(device: torch.device, attention: str) -> type[TorchStep]:
    """Triton's kernels where they can run; plain torch elsewhere, and wherever attention 'torch' was asked for: then it
    is the oracle that is wanted."""
    if attention == "torch" or not triton_support(device).is_usable:
        return TorchStep
    from serve_app.layers.gpu_step import GpuStep

    return GpuStep
