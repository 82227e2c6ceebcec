"""Random weights: a tensor's values depend on the seed, its name and its shape alone, so all formats hold the same."""

import math
import zlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.random_models.shapes import Shape, Tensor

DType = Literal["bf16", "f16"]

EMBEDDING_DEVIATION = 0.02


def random_values(shape: Shape, tensor: Tensor, seed: int) -> NDArray[np.float32]:
    """float32 of the tensor's shape, so scaled that the activations neither grow nor die over the layers."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    values = rng.standard_normal(tensor.shape, dtype=np.float32)
    if tensor.kind == "norm":
        return values * np.float32(0.05) + np.float32(1)
    if tensor.kind == "embedding":
        return values * np.float32(EMBEDDING_DEVIATION)
    deviation = 1 / math.sqrt(tensor.shape[1])
    if tensor.name.endswith(("o_proj.weight", "down_proj.weight")):
        deviation /= math.sqrt(2 * shape.n_layers)
    values *= np.float32(deviation)
    return values


def stored(values: NDArray[np.float32], dtype: DType) -> NDArray[np.uint16]:
    """The 16-bit patterns of finite values, rounded to the nearest, ties to even."""
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def rounded(values: NDArray[np.float32], dtype: DType) -> NDArray[np.float32]:
    """The same values as float32 after they went through the dtype."""
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float32)
    return (stored(values, dtype).astype(np.uint32) << np.uint32(16)).view(np.float32)
