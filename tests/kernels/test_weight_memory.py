"""Memory for weights that is made ready before it is asked for."""

import time

import psutil
import torch

from kernels.cpu import weight_memory
from kernels.cpu.packed import PackedMatrix
from kernels.formats import BY_NAME

Q4_0, F32 = BY_NAME["Q4_0"], BY_NAME["F32"]
# 144 MB in a mapping of its own, and small ones that share a mapping.
LARGE = (Q4_0.type_id, 64000, 4000)
SMALL = [(F32.type_id, 100 + i, 1000) for i in range(40)]
LARGE_BYTES = 64000 * 4000 // 32 * 18


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def wait_until_resident(more_than: int) -> None:
    end = time.monotonic() + 10
    while resident_bytes() <= more_than:
        assert time.monotonic() < end, "nothing was made ready"
        time.sleep(0.01)


def test_what_nobody_takes_is_given_back() -> None:
    before = resident_bytes()
    weight_memory.prepare([LARGE, *SMALL])
    wait_until_resident(before + int(LARGE_BYTES * 0.9))
    weight_memory.end()
    assert resident_bytes() < before + LARGE_BYTES // 10


def test_what_is_taken_is_zero_and_lasts() -> None:
    before = resident_bytes()
    weight_memory.prepare([*SMALL, LARGE])
    wait_until_resident(before + (16 << 20))
    matrices = [PackedMatrix(*shape) for shape in [LARGE, *SMALL]]
    weight_memory.end()
    for matrix in matrices:
        assert not matrix.unpack(0, 32).any()
    for number, matrix in enumerate(matrices[1:]):
        matrix.pack(0, torch.full((matrix.shape[0], 4000), number, dtype=torch.uint8))
    for number, matrix in enumerate(matrices[1:]):
        assert (matrix.unpack() == number).all()
    assert not matrices[0].unpack(63968).any()


def test_other_sizes_than_were_foreseen() -> None:
    """Types that are not kept packed are passed over; a matrix nobody spoke of gets its memory all the same."""
    weight_memory.prepare([(999, 16, 16), (Q4_0.type_id, 16, 33), SMALL[0]])
    matrix = PackedMatrix(Q4_0.type_id, 20000, 4000)
    weight_memory.prepare([])
    weight_memory.end()
    assert not matrix.unpack(19990).any()
