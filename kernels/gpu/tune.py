"""Measures which tiles are fastest on this GPU and writes them into the table: `python -m kernels.gpu.tune`.

Offline, once per GPU type: a shape takes some milliseconds, compiling its candidates seconds. What the time does not
suffice for keeps what the table had, or the rule. One token comes first, then more, type after type.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.gpu import launch_shapes
from kernels.gpu.launch_shapes import (
    BUCKETS,
    MOST_GEMV_TOKENS,
    LaunchShape,
    Table,
    bucket_of,
    device_key,
    matrix_key,
    rule,
)
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PLANAR, ZERO, PlanarForm
from kernels.gpu.quant_matmul import matmul
from kernels.gpu.support import num_cores
from kernels.gpu.timing import Timer

MODEL_SHAPES = {
    "llama-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    "llama-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)),
}
"""(rows, columns) of q/k/v, output, gate/up, down and the head, fused as loaders fuse them."""

TYPES = ("Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q5_K", "HQQ4", "HQQ8", "Q5_0", "Q3_K", "Q2_K", "Q4_1", "Q5_1")

Found = dict[str, dict[str, list[Any]]]
"""A device's part of the table."""


def candidates(form: PlanarForm, rows: int, columns: int, bucket: int, num_processors: int) -> Iterator[LaunchShape]:
    """Shapes worth measuring for a bucket of tokens, the rule's first."""
    first = rule(form, rows, columns, bucket, torch.bfloat16, num_processors)
    yield first
    num_vectors = columns // form.vector
    if bucket <= MOST_GEMV_TOKENS:
        for tile_rows, vectors, split, warps, stages in (
            (1, 32, 1, 1, 1), (2, 32, 1, 1, 1), (4, 32, 1, 1, 1), (8, 32, 1, 1, 1), (4, 64, 1, 2, 1), (4, 32, 2, 1, 1),
            (8, 64, 1, 4, 1), (2, 64, 1, 2, 1), (2, 128, 1, 4, 1), (4, 32, 1, 1, 2), (16, 32, 1, 4, 1),
        ):  # fmt: skip
            if vectors < 2 * num_vectors and tile_rows * bucket <= 32:
                yield LaunchShape("gemv", bucket, tile_rows, vectors, split, warps, stages)
    tokens = max(16, bucket)
    for tile_rows, step, split, warps, stages in (
        (64, 128, 1, 4, 3), (64, 256, 1, 4, 3), (64, 128, 2, 4, 4), (64, 256, 4, 4, 3), (64, 128, 8, 4, 3),
        (128, 128, 1, 4, 3), (128, 128, 2, 8, 3), (32, 256, 2, 4, 3),
    ):  # fmt: skip
        vectors = max(1, step // form.vector)
        if vectors * split <= num_vectors:
            yield LaunchShape("tile", tokens, tile_rows, vectors, split, warps, stages)


def tune(
    types: Iterable[str], shapes: Iterable[tuple[int, int]], device: torch.device, *,
    buckets: Iterable[int] = BUCKETS, seconds: float = 540.0, say: Callable[[str], None] = print,
) -> Found:  # fmt: skip
    """The fastest shapes of all types, sizes and buckets that `seconds` sufficed for."""
    end = time.monotonic() + seconds
    found: Found = {}
    timer = Timer(device)
    sizes, order = list(shapes), sorted(buckets)
    for name in types:
        for bucket in order:
            for rows, columns in sizes:
                if time.monotonic() > end:
                    say(f"out of time before {name}, {bucket} tokens, {rows}x{columns}")
                    return found
                if columns % PLANAR[name].block == 0:
                    matrix = random_matrix(name, rows, columns, device)
                    best, best_us, rule_us = _fastest(matrix, bucket, timer)
                    key = matrix_key(matrix.form, rows, columns)
                    found.setdefault(key, {})[str(bucket)] = best.written()
                    rate = matrix.nbytes / best_us / 1e3
                    say(f"{key} {bucket}: {best_us:.1f} us, {rate:.0f} GB/s (rule {rule_us:.1f} us)")
    return found


def random_matrix(name: str, rows: int, columns: int, device: torch.device) -> PlanarMatrix:
    """Random codes and sub-block scales, block scales of 2^-8 and minimums (HQQ: zeros) of 2^-8 as well."""
    matrix = PlanarMatrix(PLANAR[name], rows, columns, device)
    for plane in (matrix.low, matrix.high, matrix.sub):
        if plane is not None:
            plane.view(torch.uint8).random_(0, 256)
    if PLANAR[name].second == ZERO:
        matrix.block.view(torch.float32).fill_(2**-8)
    else:
        matrix.block.view(torch.float16).fill_(2**-8)
    return matrix


def merged(table: Table, device: str, found: Found) -> Table:
    """The table with what was found for a device in place of what it had."""
    of_device = table.get(device, {})
    both = {key: of_device.get(key, {}) | found.get(key, {}) for key in of_device | found}
    return table | {device: both}


def write(table: Table, path: Path) -> None:
    """As the repository keeps it: a line for each matrix."""
    devices = []
    for device, matrices in sorted(table.items()):
        lines = [f"  {json.dumps(key)}: {json.dumps(buckets)}" for key, buckets in matrices.items()]
        devices.append(f" {json.dumps(device)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(devices) + "\n}\n", encoding="utf-8")


def _fastest(matrix: PlanarMatrix, bucket: int, timer: Timer) -> tuple[LaunchShape, float, float]:
    """The fastest shape, its time, and that of the rule's, which also says what the result has to be."""
    device = matrix.device
    x = torch.randn(bucket, matrix.columns, dtype=torch.bfloat16, device=device)
    assert bucket_of(bucket) == bucket, "tokens of a bucket"
    expected: Tensor | None = None
    times: list[tuple[float, LaunchShape]] = []
    for shape in dict.fromkeys(candidates(matrix.form, *matrix.shape, bucket, num_cores(device))):
        try:
            y = matmul(matrix, x, shape).float()
        except triton.runtime.errors.OutOfResources:
            continue
        expected = y if expected is None else expected
        if (y - expected).abs().max() > 0.02 * expected.abs().max():
            raise RuntimeError(
                f"{matrix.form.name} {matrix.shape}: {shape} gives another product than the rule's shape"
            )
        times.append((timer(partial(matmul, matrix, x, shape)) * 1e6, shape))
    best_us, best = min(times, key=lambda found: found[0])
    return best, best_us, times[0][0]


def main() -> None:
    """Tunes for the first GPU and adds what it found to the table."""
    parser = argparse.ArgumentParser(prog="python -m kernels.gpu.tune", description=__doc__)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(PLANAR), metavar="TYPE")
    parser.add_argument("--models", nargs="+", default=list(MODEL_SHAPES), choices=list(MODEL_SHAPES))
    parser.add_argument("--seconds", type=float, default=540.0, help="stop measuring after this time")
    parser.add_argument("--table", type=Path, default=launch_shapes.TABLE_FILE)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to measure")
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = list(dict.fromkeys(size for model in options.models for size in MODEL_SHAPES[model]))
    found = tune(options.types, sizes, device, seconds=options.seconds)
    write(merged(launch_shapes.read_table(options.table), device_key(device), found), options.table)


if __name__ == "__main__":
    main()
