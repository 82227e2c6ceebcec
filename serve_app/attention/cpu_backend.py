"""The native CPU kernels' attention: no operation by itself, but part of the native program of a whole step."""

import torch

from kernels import dispatch
from serve_app.attention.backend import AttentionNeeds
from serve_app.attention.report import BackendReport

NATIVE_KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def look(needs: AttentionNeeds) -> BackendReport:
    """Whether it can run: a CPU, the module, and a cache that the module knows."""
    found = dispatch.native()
    if needs.device.type != "cpu":
        return BackendReport("cpu", False, f"the model is on {needs.device.type}")
    if found.ops is None:
        return BackendReport("cpu", False, found.reason)
    if needs.kv_dtype not in NATIVE_KV_DTYPES:
        return BackendReport("cpu", False, f"the KV cache is {str(needs.kv_dtype).removeprefix('torch.')}")
    return BackendReport("cpu", True, found.reason)
