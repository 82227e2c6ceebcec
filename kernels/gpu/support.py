"""Whether Triton's kernels can run on a device, and why not. Importable without Triton."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

OLDEST_TRITON = (3, 6)
OLDEST_ARCHITECTURE = (8, 0)
FP8_ARCHITECTURE = (8, 9)
"""From here on the device converts e4m3 itself; Triton refuses the type before it."""


@dataclass(frozen=True, slots=True)
class TritonSupport:
    """is_interpreted: kernels run in Triton's interpreter, on CPU tensors, for tests alone."""

    is_usable: bool
    is_interpreted: bool
    reason: str


def triton_support(device: torch.device | str) -> TritonSupport:
    """Looks at the installed Triton and at the device; SIROCCO_TRITON=0 in the environment turns all kernels off."""
    if os.environ.get("SIROCCO_TRITON") == "0":
        return TritonSupport(False, False, "turned off by SIROCCO_TRITON=0")
    return _look(torch.device(device))


@cache
def _look(device: torch.device) -> TritonSupport:
    found = _installed()
    if found is None:
        return TritonSupport(False, False, "triton is not installed")
    if found < OLDEST_TRITON:
        names = [".".join(map(str, numbers)) for numbers in (found, OLDEST_TRITON)]
        return TritonSupport(False, False, f"triton {names[0]} is installed, {names[1]} is the oldest that does")
    is_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if device.type == "cpu":
        reason = "interpreted, as TRITON_INTERPRET asks: slow" if is_interpreted else "the model is on cpu"
        return TritonSupport(is_interpreted, is_interpreted, reason)
    if device.type != "cuda" or not torch.cuda.is_available():
        return TritonSupport(False, False, f"the model is on {device.type}, which is no CUDA device here")
    if is_interpreted:
        return TritonSupport(False, True, "TRITON_INTERPRET is set: kernels take CPU tensors only")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_ARCHITECTURE:
        return TritonSupport(False, False, f"compute capability {major}.{minor} is below 8.0")
    return TritonSupport(True, False, f"triton {found[0]}.{found[1]}, compiled at first use")


def _installed() -> tuple[int, int] | None:
    """Triton's version."""
    try:
        major, minor = (int(part) for part in version("triton").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return None
    return major, minor


@cache
def num_cores(device: torch.device) -> int:
    """Multiprocessors: how many programs run at the same time, about. A few where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
