"""Which number formats a model computes in, and keeps keys and values in."""

import torch

from kernels import dispatch
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.options import DType, KvDType

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
KV_DTYPES: dict[KvDType, torch.dtype] = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8": torch.uint8,
    "f8e4m3": torch.float8_e4m3fn,
}  # fmt: skip
"""What keys and values are kept in, by the option's name; uint8 stands for q8 rows."""


def main_type(checkpoint: Checkpoint) -> str:
    """The type that most bytes of the weights have."""
    bytes_of: dict[str, int] = {}
    for tensor in checkpoint.stored():
        bytes_of[tensor.form.name] = bytes_of.get(tensor.form.name, 0) + tensor.num_bytes
    return max(bytes_of, key=lambda name: bytes_of[name], default="F32")


def compute_dtype(dtype: DType, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype of activations: the one named, or for 'auto' the one that suits the weights and the device.

    The native CPU kernels compute in float32 whatever is named. In plain torch on the CPU 'auto' is bfloat16 for a
    bfloat16 checkpoint where the CPU multiplies it natively, else float32. Elsewhere: float16 for a float16
    checkpoint, else bfloat16.
    """
    if device.type == "cpu" and dispatch.native().ops is not None:
        return torch.float32
    if dtype != "auto":
        return _DTYPES[dtype]
    main = main_type(checkpoint)
    if device.type == "cpu":
        is_native = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
        return torch.bfloat16 if main == "BF16" and is_native else torch.float32
    return torch.float16 if main == "F16" else torch.bfloat16


def kv_dtype(
    kv: KvDType, dtype: DType, checkpoint: Checkpoint, device: torch.device, *, is_exact: bool = False
) -> torch.dtype:
    """The dtype of keys and values (uint8: q8 rows): the one named, or for 'auto' one that fits the computation.

    With the native CPU kernels that is float32 where products are exact, else the dtype that the model was told to
    compute in, else bfloat16 or float32 for weights of that kind, and float16 for all others. In plain torch it is the
    dtype of activations.
    """
    if kv != "auto":
        return KV_DTYPES[kv]
    if device.type != "cpu" or dispatch.native().ops is None:
        return compute_dtype(dtype, checkpoint, device)
    if is_exact:
        return torch.float32
    if dtype != "auto":
        return _DTYPES[dtype]
    return {"F32": torch.float32, "BF16": torch.bfloat16}.get(main_type(checkpoint), torch.float16)
