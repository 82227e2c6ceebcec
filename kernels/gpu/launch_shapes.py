"""With which tiles a product is launched: from the table measured for this GPU, else a rule that needs none.

The table is launch_shapes.json, beside this file: device → type, rows and columns ("Q4_K 4096x14336") → bucket of
tokens → the numbers of a LaunchShape. It is read once; `python -m kernels.gpu.tune` measures and writes it. Nothing is
tuned while serving.
"""

import json
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
import triton

from kernels.gpu.launch import IS_INTERPRETED
from kernels.gpu.planar_forms import PlanarForm
from kernels.gpu.support import num_cores

TABLE_FILE: Final = Path(__file__).with_name("launch_shapes.json")

MOST_GEMV_TOKENS: Final = 8
"""Rows of activations that the gemv kernel can have at most."""

MOST_TILE_TOKENS: Final = 64
"""Up to here weights are decoded in registers; above, a scratch of plain numbers and a library's product are faster."""

BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows of activations that a shape is chosen for: the next one that is not smaller."""

GEMV_TOKENS_WITHOUT_TABLE: Final = 2
"""A gemv takes an instruction more a weight for each row of x, the tensor cores take none: from three rows on, by the
count of instructions, they are faster. A table may say otherwise, up to MOST_GEMV_TOKENS."""

Kernel = Literal["gemv", "tile"]

Table = dict[str, dict[str, dict[str, list[Any]]]]


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """A launch: the kernel; rows of x, rows of the matrix and vectors of a program; parts that columns are cut in."""

    kernel: Kernel
    tokens: int
    rows: int
    vectors: int
    split: int
    warps: int
    stages: int

    @staticmethod
    def read(numbers: list[Any]) -> "LaunchShape":
        """From the table's list."""
        return LaunchShape(*numbers)

    def written(self) -> list[Any]:
        """As the table has it."""
        return list(astuple(self))


def bucket_of(num_tokens: int) -> int:
    """The bucket of 1 to 64 rows of activations."""
    return next(bucket for bucket in BUCKETS if bucket >= num_tokens)


def device_key(device: torch.device) -> str:
    """The name of a GPU and its compute capability, as the table has them; "interpreter" on a CPU."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"


def matrix_key(form: PlanarForm, rows: int, columns: int) -> str:
    """How the table names a matrix."""
    return f"{form.name} {rows}x{columns}"


def read_table(path: Path) -> Table:
    """What a file says; an empty table where it is missing or no JSON: then the rule decides."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def table() -> Table:
    """The repository's."""
    return read_table(TABLE_FILE)


@cache
def launch_shape(
    form: PlanarForm, rows: int, columns: int, bucket: int, dtype: torch.dtype, device: torch.device
) -> LaunchShape:
    """How [bucket, columns] is multiplied by [rows, columns]^T; looked up once for each."""
    measured = table().get(device_key(device), {}).get(matrix_key(form, rows, columns), {}).get(str(bucket))
    if measured is not None and dtype != torch.float32:
        return LaunchShape.read(measured)
    return rule(form, rows, columns, bucket, dtype, num_cores(device))


def rule(
    form: PlanarForm, rows: int, columns: int, bucket: int, dtype: torch.dtype, num_processors: int
) -> LaunchShape:
    """A shape from the sizes alone. What it goes by is in docs/kernels.md."""
    num_vectors = max(1, columns // form.vector)
    if IS_INTERPRETED:  # a program costs by its operations, not by its elements: as few as there can be
        size = min(256, triton.next_power_of_2(rows)), min(32, triton.next_power_of_2(num_vectors))
        if bucket <= GEMV_TOKENS_WITHOUT_TABLE:
            return LaunchShape("gemv", bucket, *size, 1, 1, 1)
        return LaunchShape("tile", max(16, bucket), size[0], size[1], 2 if num_vectors > 32 else 1, 4, 1)
    if bucket <= GEMV_TOKENS_WITHOUT_TABLE:
        rows_a_program, warps = gemv_tile(rows, num_processors, most_warps=max(1, num_vectors // 32))
        vectors = min(32 * warps, triton.next_power_of_2(num_vectors))
        return LaunchShape("gemv", bucket, rows_a_program, vectors, 1, warps, 1)
    tokens = max(16, bucket)
    step_bytes = 512 if tokens <= 16 else 256
    vectors = min(max(1, step_bytes // dtype.itemsize // form.vector), triton.next_power_of_2(num_vectors))
    split = _split(-(-rows // 64), -(-num_vectors // vectors), num_processors)
    return LaunchShape("tile", tokens, 64, vectors, split, 4, 3)


@cache
def grouped_shape(
    form: PlanarForm | None, rows: int, columns: int, tokens: int, num_tiles: int, dtype: torch.dtype,
    num_processors: int, *, has_two: bool,
) -> LaunchShape:  # fmt: skip
    """How a mixture's pairs, in at most num_tiles tiles of `tokens`, are multiplied by experts of rows x columns.

    form None: plain numbers. has_two: by gate and up at once, which cannot be split. By the rule alone, once for each:
    which experts a step takes decides about its time as much as sizes do.
    """
    vector = 1 if form is None else form.vector
    num_vectors = max(1, columns // vector)
    if IS_INTERPRETED:
        size = min(256, triton.next_power_of_2(rows)), min(1024 // vector, triton.next_power_of_2(num_vectors))
        return LaunchShape("tile", tokens, *size, 2 if columns > 1024 and not has_two else 1, 4, 1)
    # Plain numbers lie in shared memory as wide as they are, three steps of them; packed ones do in a few bits.
    step_bytes = 128 if form is None else 512 if tokens <= 16 else 256
    step = step_bytes // dtype.itemsize // (2 if has_two and form is not None else 1)
    vectors = min(max(1, step // vector), triton.next_power_of_2(num_vectors))
    rows_a_program = 64 if -(-rows // 64) * num_tiles >= 2 * num_processors else 32
    programs = -(-rows // rows_a_program) * num_tiles
    split = 1 if has_two else _split(programs, -(-num_vectors // vectors), num_processors)
    return LaunchShape("tile", tokens, rows_a_program, vectors, split, 4, 3)


def _split(programs: int, steps: int, num_processors: int) -> int:
    """Parts of the columns, so that there are enough programs, each with some steps."""
    split = 1
    while split < 8 and programs * split < 2 * num_processors and steps >= 8 * split:
        split *= 2
    return split


def gemv_tile(rows: int, num_processors: int, most_warps: int) -> tuple[int, int]:
    """Rows of a program, and warps that go through them side by side, each 512 bytes of a row at a time.

    Four rows: an activation that is loaded serves all of them. Where a warp for each four would be fewer than a GPU
    needs to have enough memory asked for at any time, more warps share them; only then programs take fewer rows.
    """
    enough = 12 * num_processors
    a_program, warps = 4, 1
    while warps < min(4, most_warps) and rows * warps < enough * a_program:
        warps *= 2
    while a_program > 1 and rows * warps < enough * a_program:
        a_program //= 2
    return a_program, warps
