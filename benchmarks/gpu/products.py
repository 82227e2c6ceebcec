"""Quantised products: how fast a layer's matrices are read, beside the library's bfloat16 and torch's own int4."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.sizes import Sizes
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PLANAR
from kernels.gpu.quant_matmul import matmul
from kernels.gpu.timing import Timer
from kernels.gpu.tune import random_matrix
from serve_app.quant.weight import DenseWeight

ROWS = (1, 4, 16, 64, 512)
INT4_GROUP, INT4_TILES = 32, 8


@dataclass(frozen=True, slots=True)
class ProductRow:
    """One layer's products with `rows` rows of activations: seconds, and bytes of the weights."""

    name: str
    rows: int
    seconds: float
    weight_bytes: int
    products: int

    @property
    def bytes_per_s(self) -> float:
        """Of weights."""
        return self.weight_bytes / self.seconds

    @property
    def operations_per_s(self) -> float:
        """Multiplications and additions."""
        return 2 * self.products / self.seconds


Multiply = Callable[[Tensor], Tensor]


def measure(
    sizes: Sizes, device: torch.device, has_time: Callable[[], bool], rows: Iterable[int] = ROWS
) -> Iterator[ProductRow]:
    """All types, until the time is up; cuBLAS and torch's int4 first, since the others are held against them."""
    timer = Timer(device)
    makers: dict[str, Callable[[int, int], tuple[Multiply, int]]] = {
        "bf16 (torch)": lambda n, k: _bf16(n, k, device),
        "bf16 (as loaded)": lambda n, k: _dense(n, k, device),
    }
    if device.type == "cuda" and _has_int4(device):
        makers["int4 (torch)"] = lambda n, k: _int4(n, k, device)
    for name in PLANAR:
        makers[name] = lambda n, k, name=name: _planar(random_matrix(name, n, k, device))
    for name, make in makers.items():
        if not has_time():
            return
        layer = [(columns, *make(count, columns)) for count, columns in sizes.layer_matrices.values()]
        products = sum(count * columns for count, columns in sizes.layer_matrices.values())
        for num in rows:
            seconds = 0.0
            for columns, multiply, _ in layer:
                x = torch.randn(num, columns, device=device).bfloat16()
                seconds += timer(lambda multiply=multiply, x=x: multiply(x))
            yield ProductRow(name, num, seconds, sum(size for _, _, size in layer), products * num)


def _planar(matrix: PlanarMatrix) -> tuple[Multiply, int]:
    return lambda x: matmul(matrix, x), matrix.nbytes


def _bf16(rows: int, columns: int, device: torch.device) -> tuple[Multiply, int]:
    weight = torch.randn(rows, columns, device=device).bfloat16()
    return lambda x: functional.linear(x, weight), weight.nbytes


def _dense(rows: int, columns: int, device: torch.device) -> tuple[Multiply, int]:
    weight = DenseWeight(torch.randn(rows, columns, device=device).bfloat16())
    return weight.matmul, weight.nbytes


def _has_int4(device: torch.device) -> bool:
    """Whether this build of torch has the operators, for this card: they are internal, and change."""
    try:
        multiply, _ = _int4(64, 1024, device)
        multiply(torch.zeros(1, 1024, dtype=torch.bfloat16, device=device))
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # of the card, not of the operators
    except (RuntimeError, AttributeError) as error:
        print(f"int4 (torch): not measured ({(str(error).splitlines() or [''])[0]})", flush=True)
        return False
    return True


def _int4(rows: int, columns: int, device: torch.device) -> tuple[Multiply, int]:
    """torch's tinygemm: codes of four bits, a bfloat16 scale and zero for each group."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, INT4_TILES)
    scales = torch.full((columns // INT4_GROUP, rows, 2), 0.01, dtype=torch.bfloat16, device=device)
    size = codes.nbytes + scales.nbytes
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, INT4_GROUP, scales), size
