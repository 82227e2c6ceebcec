"""Several arrays of a step in one buffer, so that one copy brings all of them to a device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16
_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


class ArrayPack:
    """Where arrays of given shapes lie in a buffer of num_bytes, each from a multiple of 16 bytes on."""

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        """arrays: of int32 or int64; their shapes and dtypes count, not their contents."""
        self._kinds = [(array.shape, array.dtype) for array in arrays]
        self._begins: list[int] = []
        end = 0
        for array in arrays:
            self._begins.append(end)
            end = -(-(end + array.nbytes) // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = max(end, _ALIGNMENT)

    def host_buffer(self, device: torch.device) -> Tensor:
        """uint8 [num_bytes] to be filled and copied to the device: pinned for CUDA, from torch's cache of such memory,
        which gives none of it out again before a copy from it has ended."""
        return torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def arrays(self, buffer: Tensor) -> list[NDArray[Any]]:
        """The arrays as views of a buffer of the host."""
        data = buffer.numpy()
        return [
            np.ndarray(shape, dtype, data, begin)
            for (shape, dtype), begin in zip(self._kinds, self._begins, strict=True)
        ]

    def tensors(self, buffer: Tensor) -> list[Tensor]:
        """The arrays as views of a buffer on any device."""
        views = []
        for (shape, dtype), begin in zip(self._kinds, self._begins, strict=True):
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            views.append(buffer[begin : begin + size].view(_DTYPES[dtype]).view(shape))
        return views


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays on a device, by one copy that the host does not wait for; on the CPU they are not copied at all."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    pack = ArrayPack(arrays)
    buffer = pack.host_buffer(device)
    for view, array in zip(pack.arrays(buffer), arrays, strict=True):
        view[...] = array
    return pack.tensors(buffer.to(device, non_blocking=True))
