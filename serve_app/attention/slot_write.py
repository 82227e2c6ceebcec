"""Keys and values into a step's slots, in plain torch."""

from torch import Tensor

from kernels.reference.norm import kv_write
from serve_app.attention.device_batch import DeviceBatch


def write_slots(batch: DeviceBatch, layer: int, k: Tensor, v: Tensor) -> None:
    """k, v [T, n_kv_heads, head_dim], rotated. Triton's kernels write while they rotate: see GpuStep."""
    kv_write(k, v, batch.k[layer], batch.v[layer], batch.slots(layer), *batch.scales(layer))
