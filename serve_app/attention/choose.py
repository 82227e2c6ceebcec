"""Which attention backend runs here, and why the others do not."""

from dataclasses import dataclass

import torch

from kernels import dispatch
from serve_app.attention.backend import AttentionBackend
from serve_app.attention.cpu_backend import CpuAttention
from serve_app.attention.torch_backend import TorchAttention
from serve_app.errors import LaunchError


@dataclass(frozen=True, slots=True)
class BackendReport:
    """One backend as looked at: is_usable and why; the first usable one of a list is the one that 'auto' takes."""

    name: str
    is_usable: bool
    reason: str


def list_backends(device: torch.device | str, dtype: torch.dtype) -> list[BackendReport]:
    """All backends in the order of preference, for this device and this dtype of the KV cache."""
    return [_look_at_cpu(torch.device(device), dtype), BackendReport("torch", True, "plain torch runs everywhere")]


def choose_backend(device: torch.device | str, dtype: torch.dtype, name: str = "auto") -> AttentionBackend:
    """The named backend, or with 'auto' the first usable one. LaunchError says why a named one cannot run."""
    reports = list_backends(device, dtype)
    if name == "auto":
        name = next(r.name for r in reports if r.is_usable)
    report = next((r for r in reports if r.name == name), None)
    if report is None:
        known = ", ".join(r.name for r in reports)
        raise LaunchError(f"There is no attention backend {name!r}; there are auto, {known}.")
    if not report.is_usable:
        raise LaunchError(f"The attention backend {name!r} cannot run here: {report.reason}.")
    if name == "torch":
        return TorchAttention()
    ops = dispatch.native().ops
    assert ops is not None
    return CpuAttention(ops)


def _look_at_cpu(device: torch.device, dtype: torch.dtype) -> BackendReport:
    found = dispatch.native()
    if device.type != "cpu":
        return BackendReport("cpu", False, f"the model is on {device.type}")
    if found.ops is None:
        return BackendReport("cpu", False, found.reason)
    if dtype not in found.ops.FLOAT_CODES:
        return BackendReport("cpu", False, f"the KV cache is {dtype}")
    return BackendReport("cpu", True, found.reason)
