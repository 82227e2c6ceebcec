"""The native draw of tokens on arrays of the host. See kernels.reference.sampling for what it computes."""

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import _native


def _require(holds: bool) -> None:
    assert holds, "an array handed to a native kernel has the wrong shape, dtype or strides"


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """seeds and positions [S] → float64 [S] in [0, 1), Philox4x32-10."""
    out = np.empty(len(seeds))
    _require(seeds.dtype == np.uint64 and positions.dtype == np.int64 and len(positions) == len(seeds))
    _require(seeds.flags.c_contiguous and positions.flags.c_contiguous)
    _native.uniform(seeds.ctypes.data, positions.ctypes.data, out.ctypes.data, len(seeds))
    return out


def draw_tokens(
    logits: NDArray[np.float32],
    temperature: NDArray[np.float32],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    min_p: NDArray[np.float64],
    u: NDArray[np.float64],
) -> NDArray[np.int64]:
    """logits [S, vocab], the others [S] → ids [S]. Temperature 0 takes the likeliest token, the first among equals.

    Each row's cost does not depend on the other rows.
    """
    rows, vocab_size = logits.shape
    out = np.empty(rows, np.int64)
    _require(logits.flags.c_contiguous and logits.dtype == np.float32)
    _require(temperature.dtype == np.float32 and top_k.dtype == np.int64)
    parameters = (temperature, top_k, top_p, min_p, u)
    _require(all(p.shape == (rows,) and p.flags.c_contiguous for p in parameters))
    _require(all(p.dtype == np.float64 for p in parameters[2:]))
    _native.draw_tokens(
        logits.ctypes.data,
        vocab_size,
        rows,
        vocab_size,
        temperature.ctypes.data,
        top_k.ctypes.data,
        top_p.ctypes.data,
        min_p.ctypes.data,
        u.ctypes.data,
        out.ctypes.data,
    )
    return out
