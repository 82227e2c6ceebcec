"""Loads a model in a fresh process, multiplies by every weight, and prints what that added to its resident memory."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.options import ModelSource
from serve_app.quant.weight import Weight


def status_mb(key: str) -> float:
    """A line of /proc/self/status in MB. (getrusage's peak is inherited from the process that started this one.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def weights_of(thing: Any, seen: set[int]) -> list[Weight]:
    """All weights reachable from an object through attributes and lists."""
    if id(thing) in seen or isinstance(thing, torch.Tensor | str | int | float | type(None)):
        return []
    seen.add(id(thing))
    if hasattr(thing, "matmul") and hasattr(thing, "dequantize"):
        return [thing]
    children = list(thing) if isinstance(thing, list | tuple) else list(getattr(thing, "__dict__", {}).values())
    return [weight for child in children for weight in weights_of(child, seen)]


def load_and_use(path: str, dtype: Any) -> int:
    """Returns the number of weights used."""
    loaded = load_model(resolve(ModelSource(model=path)), dtype=dtype, device="cpu")
    weights = weights_of(loaded.model, set())
    for weight in weights:
        weight.matmul(torch.ones(1, weight.shape[1], dtype=weight.dtype))
    return len(weights)


torch.set_num_threads(1)
load_and_use(sys.argv[1], sys.argv[3])  # a small model first, so that nothing of the process is counted
before = status_mb("VmHWM")
count = load_and_use(sys.argv[2], sys.argv[3])
peak = status_mb("VmHWM")
print(json.dumps({"weights": count, "peak_mb": peak, "added_mb": peak - before}))
