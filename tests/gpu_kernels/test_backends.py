"""One test for all attention backends: an error of at most twice plain torch's at the same dtype.

Both are measured against float64 on the same numbers, as flash-attention's own tests do. Without a CUDA device plain
torch, the native CPU kernels and Triton's (interpreted) run here.
"""

from dataclasses import dataclass

import pytest
import torch
from paged_cases import PagedCase, device_batch, make_case
from torch import Tensor

from kernels.cpu.attention import AttentionPlan
from serve_app.attention.backend import AttentionNeeds, AttentionShape, PlannedAttention
from serve_app.attention.choose import ORDER, architecture_of
from serve_app.attention.device_batch import DeviceBatch

EVERYWHERE = ["torch", "triton"]
LIBRARIES = [c.name for c in ORDER if c.name not in ("cpu", *EVERYWHERE)]


@dataclass(frozen=True)
class Problem:
    """(queries, context) of each request, then the layer."""

    requests: tuple[tuple[int, int], ...]
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    softcap: float = 0.0
    window: int = 0
    block_size: int = 32

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            0, self.n_heads, self.n_kv_heads, self.head_dim, self.head_dim**-0.5, self.softcap, self.window
        )


DECODES = ((1, 1), (1, 97), (1, 64), (1, 33), (1, 200))
MIXED = ((1, 130), (33, 33), (7, 100), (1, 5), (0, 9))
PROBLEMS = [
    Problem(DECODES),
    Problem(MIXED),
    Problem(DECODES, n_heads=8, n_kv_heads=1, head_dim=128),
    Problem(MIXED, n_heads=3, n_kv_heads=3, head_dim=64, block_size=16),
    Problem(DECODES, softcap=8.0),
    Problem(MIXED, window=24),
    Problem(DECODES, window=40, softcap=5.0),
]


class NativeAttention:
    """The native kernels' attention as a backend: it has no step of its own, but the same kernel runs in programs."""

    def plan(self, batch: DeviceBatch) -> "NativeAttention":
        self.batch = batch
        return self

    def run(self, shape: AttentionShape, q: Tensor) -> Tensor:
        batch, k_cache = self.batch, self.batch.k[0]
        plan = AttentionPlan(
            batch.tables(0), batch.query_start, batch.context_lens, len(q), tuple(k_cache.shape), shape.n_heads,
            shape.head_dim,
        )  # fmt: skip
        out = plan.run(q.float(), k_cache, batch.v[0], scale=shape.scale, softcap=shape.softcap, window=shape.window)
        return out.to(q.dtype)


def plain(case: PagedCase, shape: AttentionShape, dtype: torch.dtype) -> Tensor:
    """Attention as one would write it, every operation in dtype."""
    exact = case.exact()
    starts, contexts = case.host_lengths
    group, rows = shape.n_heads // shape.n_kv_heads, []
    for r, context in enumerate(contexts):
        q = exact.q[starts[r] : starts[r + 1]].to(dtype).transpose(0, 1)
        blocks = case.block_tables[r, : -(-context // case.k_cache.shape[1])].long()
        k, v = (
            cache[blocks].flatten(0, 1)[:context].to(dtype).transpose(0, 1).repeat_interleave(group, 0)
            for cache in (exact.k_cache, exact.v_cache)
        )
        scores = (q @ k.transpose(1, 2)) * shape.scale
        if shape.softcap:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        row, key = torch.arange(context - q.shape[1], context).unsqueeze(1), torch.arange(context)
        hidden = (key > row) | ((key <= row - shape.window) if shape.window else False)
        scores = scores.masked_fill(hidden.to(scores.device), float("-inf"))
        rows.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(rows)


def check(planned: PlannedAttention, case: PagedCase, shape: AttentionShape) -> None:
    dtype = case.q.dtype
    right = plain(case, shape, torch.float64)
    allowed = (plain(case, shape, dtype).double() - right).abs().max()
    out = planned.run(shape, case.q)
    assert out.dtype == dtype
    # A last bit of results of size 1, where plain torch happens to be exact; in float32 it is the scores' last bits,
    # of size 5, that make up all of the error.
    least = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 0.5)
    assert (out.double() - right).abs().max() <= max(2 * allowed, least)


def make(problem: Problem, dtype: torch.dtype, kv_dtype: torch.dtype | None, device: torch.device) -> PagedCase:
    return make_case(
        problem.requests, problem.n_heads, problem.n_kv_heads, problem.head_dim, dtype, kv_dtype,
        block_size=problem.block_size, device=device,
    )  # fmt: skip


FORMATS = [
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float32, torch.float8_e4m3fn),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS, ids=str)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_error_is_at_most_twice_plain_torchs(
    name: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, problem: Problem, device: torch.device
) -> None:
    case = make(problem, dtype, kv_dtype, device)
    candidate = next(c for c in ORDER if c.name == name)
    needs = needs_of(problem, case)
    assert candidate.look(needs).is_usable
    assert candidate.make is not None
    check(candidate.make(needs).plan(device_batch(case)), case, problem.shape)


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_of_the_native_kernels(dtype: torch.dtype, problem: Problem) -> None:
    case = make(problem, dtype, None, torch.device("cpu"))
    check(NativeAttention().plan(device_batch(case)), case, problem.shape)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.window], ids=["mixed", "decodes"])
@pytest.mark.parametrize("name", ["native", *EVERYWHERE])
def test_blocks_behind_the_window_are_not_read(name: str, problem: Problem, device: torch.device) -> None:
    """They were given up: whatever stands there, even NaN, changes no bit."""
    case = make(problem, torch.float32, None, torch.device("cpu") if name == "native" else device)
    candidates = {c.name: c for c in ORDER}
    make_backend = candidates[name].make if name != "native" else None
    backend = NativeAttention() if make_backend is None else make_backend(needs_of(problem, case))
    before = backend.plan(device_batch(case)).run(problem.shape, case.q)
    for cache in (case.k_cache, case.v_cache):
        cache.resize_(len(cache) + 1, *cache.shape[1:])
        cache[-1] = torch.nan
    num_dead = 0
    starts, contexts = case.host_lengths
    for r, context in enumerate(contexts):
        first_key = context - (starts[r + 1] - starts[r]) - problem.window + 1
        num_dead += max(0, first_key // problem.block_size)
        case.block_tables[r, : max(0, first_key // problem.block_size)] = len(case.k_cache) - 1
    assert num_dead > 2
    after = backend.plan(device_batch(case)).run(problem.shape, case.q)
    assert torch.equal(before, after)


@pytest.mark.gpu
@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS, ids=str)
@pytest.mark.parametrize("name", LIBRARIES)
def test_error_of_libraries_where_they_are(
    name: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, problem: Problem, device: torch.device
) -> None:
    """Those that are not here, or not for this case, are skipped by name: gpu_check.py counts and says them."""
    case = make(problem, dtype, kv_dtype, device)
    candidate = next(c for c in ORDER if c.name == name)
    needs = needs_of(problem, case)
    report = candidate.look(needs)
    if not report.is_usable:
        pytest.skip(f"{name}: {report.reason}")
    assert candidate.make is not None
    check(candidate.make(needs).plan(device_batch(case)), case, problem.shape)


def needs_of(problem: Problem, case: PagedCase) -> AttentionNeeds:
    return AttentionNeeds(
        case.q.device, architecture_of(case.q.device), case.q.dtype, case.k_cache.dtype, problem.block_size,
        (problem.shape,),
    )  # fmt: skip
