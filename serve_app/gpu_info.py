"""What can be seen of GPUs without importing torch."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

_DEVICE = re.compile(r"nvidia\d+")


def num_gpus(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """NVIDIA devices of this machine that CUDA_VISIBLE_DEVICES leaves to this process."""
    try:
        found = sum(_DEVICE.fullmatch(entry.name) is not None for entry in (root / "dev").iterdir())
    except OSError:
        return 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    # As CUDA reads it: a number that there is not hides those behind it. Names (GPU-…, MIG-…) count as they are.
    count = 0
    for word in filter(None, map(str.strip, visible.split(","))):
        if word.lstrip("-").isdigit() and not 0 <= int(word) < found:
            break
        count += 1
    return count


def wants_gpu(device: str, *, is_private: bool) -> bool:
    """Whether an engine's replica asks Ray for a GPU: 'auto' does where this machine, a private cluster, has one."""
    if device == "auto":
        return is_private and num_gpus() > 0
    return device.startswith("cuda")
