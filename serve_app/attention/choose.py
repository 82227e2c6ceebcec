"""Which attention runs here, and why the others do not."""

from dataclasses import dataclass

import torch

from kernels import dispatch
from serve_app.attention.backend import AttentionBackend
from serve_app.attention.torch_backend import TorchAttention
from serve_app.errors import LaunchError

NATIVE_KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


@dataclass(frozen=True, slots=True)
class BackendReport:
    """One backend as looked at: is_usable and why; the first usable one of a list is the one that 'auto' takes."""

    name: str
    is_usable: bool
    reason: str


def list_backends(device: torch.device | str, dtype: torch.dtype) -> list[BackendReport]:
    """All backends in the order of preference, for this device and this dtype of the KV cache (uint8: q8 rows)."""
    return [_look_at_cpu(torch.device(device), dtype), _look_at_torch(dtype)]


def choose_backend(device: torch.device | str, dtype: torch.dtype, name: str = "auto") -> AttentionBackend | None:
    """The named backend, or with 'auto' the first usable one. LaunchError says why a named one cannot run.

    None is the backend 'cpu': no operation by itself, but part of the native program of a whole step.
    """
    reports = list_backends(device, dtype)
    known = ", ".join(r.name for r in reports)
    if name == "auto":
        report = next((r for r in reports if r.is_usable), reports[-1])
    else:
        report = next((r for r in reports if r.name == name), BackendReport(name, False, ""))
        if not report.reason:
            raise LaunchError(f"There is no attention backend {name!r}; there are auto, {known}.")
    if not report.is_usable:
        raise LaunchError(f"The attention backend {report.name!r} cannot run here: {report.reason}.")
    return None if report.name == "cpu" else TorchAttention()


def _look_at_cpu(device: torch.device, dtype: torch.dtype) -> BackendReport:
    found = dispatch.native()
    if device.type != "cpu":
        return BackendReport("cpu", False, f"the model is on {device.type}")
    if found.ops is None:
        return BackendReport("cpu", False, found.reason)
    if dtype not in NATIVE_KV_DTYPES:
        return BackendReport("cpu", False, f"the KV cache is {dtype}")
    return BackendReport("cpu", True, found.reason)


def _look_at_torch(dtype: torch.dtype) -> BackendReport:
    if dtype == torch.uint8:
        return BackendReport("torch", False, "a q8 KV cache needs the native CPU kernels")
    return BackendReport("torch", True, "plain torch runs everywhere")
