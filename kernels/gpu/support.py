"""Whether Triton's kernels can run on a device, and why not. Importable without Triton."""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache

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
    """Looks at the installed Triton and at the device."""
    device = torch.device(device)
    version, is_interpreted = _installed()
    if version is None:
        return TritonSupport(False, False, "triton is not installed")
    if version < OLDEST_TRITON:
        oldest, found = (".".join(map(str, v)) for v in (OLDEST_TRITON, version))
        return TritonSupport(False, False, f"triton {found} is installed, {oldest} is the oldest that does")
    if device.type == "cpu":
        reason = "interpreted, as TRITON_INTERPRET asks: slow" if is_interpreted else "the model is on cpu"
        return TritonSupport(is_interpreted, is_interpreted, reason)
    if device.type != "cuda" or not torch.cuda.is_available():
        return TritonSupport(False, False, f"the model is on {device.type}, which is no CUDA device here")
    if is_interpreted:
        return TritonSupport(False, True, "TRITON_INTERPRET is set: kernels take CPU tensors only")
    found_arch = torch.cuda.get_device_capability(device)
    if found_arch < OLDEST_ARCHITECTURE:
        return TritonSupport(False, False, f"compute capability {found_arch[0]}.{found_arch[1]} is below 8.0")
    return TritonSupport(True, False, f"triton {version[0]}.{version[1]}, compiled at first use")


@cache
def _installed() -> tuple[tuple[int, int] | None, bool]:
    """Triton's version, and whether it interprets. It fixes the latter as kernels are defined."""
    if importlib.util.find_spec("triton") is None:
        return None, False
    try:
        version = str(importlib.import_module("triton").__version__)
    except (ImportError, AttributeError):
        return None, False
    major, minor = (int(part) for part in version.split(".")[:2])
    is_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    return (major, minor), is_interpreted


def num_cores(device: torch.device) -> int:
    """Multiprocessors: how many programs run at the same time, about. A few where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
