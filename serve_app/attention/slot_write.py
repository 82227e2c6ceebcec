"""Keys and values into a step's slots, for backends that only read the cache."""

from torch import Tensor

from kernels.gpu.support import triton_support
from kernels.reference import norm as reference
from serve_app.attention.device_batch import DeviceBatch


def write_slots(batch: DeviceBatch, layer: int, k: Tensor, v: Tensor) -> None:
    """k, v [T, n_kv_heads, head_dim], rotated; by Triton's kernel where it can run, else by plain torch."""
    where = (batch.k[layer], batch.v[layer], batch.slots(layer), *batch.scales(layer))
    if not triton_support(k.device).is_usable:
        reference.kv_write(k, v, *where)
        return
    from kernels.gpu.kv_write import kv_write

    kv_write(k, v, *where)
