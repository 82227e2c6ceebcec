"""A layer's experts by Triton's grouped products, routing included: what a mixture adds to the table of products."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.products import ProductRow
from benchmarks.gpu.sizes import MixtureSizes
from kernels.gpu import grouped_matmul as grouped
from kernels.gpu.routing import Groups, route
from kernels.gpu.timing import Timer
from kernels.gpu.tune import random_matrix

ROWS = (1, 16, 64)
TYPES = ("bf16", "Q4_K")


def measure(
    sizes: MixtureSizes, device: torch.device, has_time: Callable[[], bool], rows: Iterable[int] = ROWS
) -> Iterator[ProductRow]:
    """All types, until the time is up. Bytes are those of the experts that some token takes."""
    timer = Timer(device)
    for type_name in TYPES:
        if not has_time():
            return
        shapes = ((sizes.inner, sizes.hidden), (sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner))
        parts = [_experts(type_name, sizes.experts * count, columns, device) for count, columns in shapes]
        for num in rows:
            x = torch.randn(num, sizes.hidden, device=device).bfloat16()
            logits = torch.randn(num, sizes.experts, device=device)
            seconds = timer(partial(_layer, sizes, parts, x, logits))
            taken = len(logits.topk(sizes.top_k).indices.unique())
            weight_bytes = sum(part.nbytes for part in parts) * taken // sizes.experts
            products = num * sizes.top_k * 3 * sizes.hidden * sizes.inner
            yield ProductRow(f"{type_name}, {sizes.name}'s experts", num, seconds, weight_bytes, products)
        del parts


def _layer(sizes: MixtureSizes, parts: Sequence[grouped.Matrix], x: Tensor, logits: Tensor) -> Tensor:
    """parts: gate, up and down."""
    chosen, factors = route(logits, "softmax", sizes.top_k, is_renormalised=True)
    groups = Groups.of(chosen, sizes.experts)
    gate, up, down = parts
    return grouped.combined(down, grouped.gated(gate, up, x, groups, "silu"), groups, factors)


def _experts(type_name: str, rows: int, columns: int, device: torch.device) -> grouped.Matrix:
    """Experts one below the other."""
    if type_name == "bf16":
        return torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    return random_matrix(type_name, rows, columns, device)
