"""Paged attention against plain torch, and its promise of equal bits, in every instruction set."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu import _native, layers
from kernels.cpu.attention import AttentionPlan
from kernels.reference.attention import paged_attention
from kernels.reference.kv import decode_q8, q8_row_bytes

pytestmark = pytest.mark.usefixtures("each_isa")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]


@dataclass
class Step:
    """Requests with their whole contexts in a cache, of which any part of the queries can be computed."""

    q: list[Tensor]
    tables: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_size: int

    def run(self, pieces: list[tuple[int, int, int]], threads: int = 0, **options: float) -> list[Tensor]:
        """Queries [begin, end) of some requests, each a triple, in one call."""
        q = torch.cat([self.q[r][begin:end] for r, begin, end in pieces])
        start = [0]
        for _, begin, end in pieces:
            start.append(start[-1] + end - begin)
        plan = AttentionPlan(
            self.tables[[r for r, _, _ in pieces]], torch.tensor(start, dtype=torch.int32),
            torch.tensor([end for _, _, end in pieces], dtype=torch.int32), len(q), tuple(self.k_cache.shape),
            q.shape[1], q.shape[2], threads,
        )  # fmt: skip
        out = plan.run(q, self.k_cache, self.v_cache, **options)
        return list(out.split([end - begin for _, begin, end in pieces]))

    def reference(self, r: int, **options: float) -> Tensor:
        caches = [
            decode_q8(c, self.q[r].shape[2]) if c.dtype == torch.uint8 else c.float()
            for c in (self.k_cache, self.v_cache)
        ]
        context = len(self.q[r])
        exact = [self.q[r].double(), caches[0], caches[1]]
        return paged_attention(*exact, self.tables[r : r + 1], [0, context], [context], **options)


def make_step(
    contexts: list[int],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_size: int = 16,
    seed: int = 0,
) -> Step:
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-c // block_size) for c in contexts]
    order = torch.randperm(sum(counts) + 3, generator=generator).to(torch.int32)
    tables = torch.full((len(contexts), max(counts) + 1), -1, dtype=torch.int32)
    row = q8_row_bytes(head_dim) if dtype == torch.uint8 else head_dim
    shape = (len(order), block_size, n_kv_heads, row)
    # What nobody wrote is NaN.
    caches = [torch.full(shape, 255 if dtype == torch.uint8 else math.nan, dtype=dtype) for _ in range(2)]
    queries, used = [], 0
    for r, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        tables[r, :count] = order[used : used + count]
        used += count
        q, k, v = torch.randn(3, context, max(n_heads, n_kv_heads), head_dim, generator=generator)
        slots = (
            tables[r, :count].long().repeat_interleave(block_size)[:context] * block_size
            + torch.arange(context) % block_size
        )
        layers.rope_kv(None, k[:, :n_kv_heads], v[:, :n_kv_heads], slots=slots, k_cache=caches[0], v_cache=caches[1])
        queries.append(q[:, :n_heads] * 2)
    return Step(queries, tables, caches[0], caches[1], block_size)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


SHAPES = [(4, 2, 16), (3, 1, 24), (6, 6, 6), (20, 1, 40), (7, 1, 64), (8, 2, 128), (2, 2, 80)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), SHAPES)
def test_prefill_and_decode(n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    step = make_step([1, 70, 33, 300, 64], n_heads, n_kv_heads, head_dim, dtype)
    whole = step.run([(r, 0, len(q)) for r, q in enumerate(step.q)])
    last = step.run([(r, len(q) - 1, len(q)) for r, q in enumerate(step.q)])
    for r in range(len(step.q)):
        torch.testing.assert_close(whole[r].double(), step.reference(r), rtol=1e-5, atol=1e-5)
        assert same(last[r], whole[r][-1:])


OPTIONS = [
    {"window": 1},
    {"window": 40},
    {"window": 300},
    {"softcap": 3.0},
    {"scale": 0.7},
    {"window": 257, "softcap": 20.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8], ids=str)
def test_window_softcap_and_scale(options: dict[str, float], dtype: torch.dtype) -> None:
    step = make_step([600, 5], 4, 2, 32, dtype)
    got = step.run([(0, 0, 600), (1, 0, 5)], **options)
    for r in range(2):
        torch.testing.assert_close(got[r].double(), step.reference(r, **options), rtol=1e-5, atol=1e-5)
    for at in (0, 255, 256, 257, 599):
        assert same(step.run([(0, at, at + 1)], **options)[0], got[0][at : at + 1])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_token_has_the_same_bits_in_any_chunk_beside_any_neighbour(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    heads, kv_heads, head_dim = data.draw(st.sampled_from(SHAPES))
    options = data.draw(st.sampled_from([{}, {"window": 100}, {"softcap": 5.0}]))
    contexts = data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=3))
    step = make_step(contexts, heads, kv_heads, head_dim, dtype, block_size=data.draw(st.sampled_from([4, 16, 32])))
    whole = [step.run([(r, 0, c)], threads=1, **options)[0] for r, c in enumerate(contexts)]
    at = [0] * len(contexts)
    while any(a < c for a, c in zip(at, contexts, strict=True)):
        pieces = []
        for r, context in enumerate(contexts):
            size = min(data.draw(st.sampled_from([0, 1, 1, 2, 5, 17, 130, 400])), context - at[r])
            if size:
                pieces.append((r, at[r], at[r] + size))
        if not pieces:
            pieces = [(r, at[r], context) for r, context in enumerate(contexts) if at[r] < context]
        got = step.run(pieces, threads=data.draw(st.sampled_from([1, 2, 7])), **options)
        for (r, begin, end), out in zip(pieces, got, strict=True):
            assert same(out, whole[r][begin:end])
            at[r] = end


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_threads_do_not_change_bits(dtype: torch.dtype, one_thread_after: None) -> None:
    step = make_step([2000, 900], 8, 4, 64, dtype)
    pieces = [(0, 1999, 2000), (1, 500, 900)]
    expected = step.run(pieces, threads=1)
    _native.set_num_threads(3)
    for threads in (2, 3, 16):
        for _ in range(5):
            for a, b in zip(step.run(pieces, threads=threads), expected, strict=True):
                assert same(a, b)


def test_a_long_decode_is_cut_for_the_threads() -> None:
    step = make_step([3000], 8, 4, 64, torch.float16)
    tables, start = step.tables, torch.tensor([0, 1], dtype=torch.int32)
    lens = torch.tensor([3000], dtype=torch.int32)
    units = [AttentionPlan(tables, start, lens, 1, tuple(step.k_cache.shape), 8, 64, n).num_units for n in (1, 2, 8)]
    assert units[0] == 1
    assert units[2] >= units[1] >= 8


def test_an_empty_step_and_requests_without_queries() -> None:
    step = make_step([20], 4, 2, 16, torch.float32)
    tables = step.tables.expand(3, -1).contiguous()
    start, lens = torch.tensor([0, 0, 1, 1], dtype=torch.int32), torch.tensor([20, 20, 0], dtype=torch.int32)
    plan = AttentionPlan(tables, start, lens, 1, tuple(step.k_cache.shape), 4)
    got = plan.run(step.q[0][19:], step.k_cache, step.v_cache)
    assert same(got, step.run([(0, 19, 20)])[0])
    none = torch.zeros(1, dtype=torch.int32)
    plan = AttentionPlan(tables[:0], none, none[:0], 0, tuple(step.k_cache.shape), 4)
    assert plan.run(step.q[0][:0], step.k_cache, step.v_cache).shape == (0, 64)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_broken_token_does_not_reach_those_before_it(where: str, bad: float) -> None:
    step = make_step([400], 4, 4, 32, torch.float32)
    expected = step.run([(0, 0, 400)])[0]
    cache = step.k_cache if where == "k" else step.v_cache
    cache[step.tables[0, 300 // 16], 300 % 16] = bad
    got = step.run([(0, 0, 400)])[0]
    assert same(got[:300], expected[:300])
    for at in (300, 301, 399):
        one = step.run([(0, at, at + 1)])[0]
        assert torch.equal(one.isnan(), got[at : at + 1].isnan())
        assert same(one.nan_to_num(), got[at : at + 1].nan_to_num())
    assert torch.equal(got[300:].isfinite(), step.reference(0)[300:].isfinite())


def test_queries_in_a_fused_row_at_an_odd_address() -> None:
    step = make_step([50], 4, 2, 16, torch.float16)
    fused = torch.full((50, 161), math.nan)
    fused[:, 1:65] = step.q[0].flatten(1)
    start, lens = torch.tensor([0, 50], dtype=torch.int32), torch.tensor([50], dtype=torch.int32)
    plan = AttentionPlan(step.tables, start, lens, 50, tuple(step.k_cache.shape), 4)
    got = plan.run(fused[:, 1:65].unflatten(1, (4, 16)), step.k_cache, step.v_cache)
    assert same(got, step.run([(0, 0, 50)])[0])


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_long_contexts(head_dim: int, dtype: torch.dtype) -> None:
    step = make_step([5000], 6, 2, head_dim, dtype)
    got = step.run([(0, 4000, 5000)])[0]
    torch.testing.assert_close(got.double(), step.reference(0)[4000:], rtol=1e-5, atol=1e-5)
    for at in range(4000, 5000, 97):
        assert same(step.run([(0, at, at + 1)], threads=4)[0], got[at - 4000 : at - 3999])
