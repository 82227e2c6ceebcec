"""The device that an engine runs on."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from serve_app.errors import LaunchError


def choose_device(wanted: str) -> str:
    """A torch device: 'auto' is the first CUDA device that torch sees, else the CPU. LaunchError, naming --device, for
    one that there is not."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise LaunchError(f"--device {wanted!r} is none; there are auto, cpu, cuda and cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise LaunchError(f"--device {wanted!r} is not supported; there are auto, cpu, cuda and cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise LaunchError(f"--device {wanted}: {why}.")
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise LaunchError(
            f"--device {wanted}: there are {torch.cuda.device_count()} CUDA devices, the first is cuda:0."
        )
    return wanted


def on_device(device: str | torch.device) -> AbstractContextManager[Any]:
    """Makes it CUDA's current device in this thread: kernels are launched there whatever their tensors say."""
    device = torch.device(device)
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
