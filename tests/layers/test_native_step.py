"""A recorded native program against the same code run eagerly in plain torch, for what families may be made of."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_llama import Piece, TinyPool, make_batch
from torch import Tensor

from serve_app.attention.backend import AttentionShape
from serve_app.attention.torch_backend import TorchAttention
from serve_app.engine.forward import TorchForward, choose_forward, record
from serve_app.layers.rotary import Rotary
from serve_app.layers.step import NormWeights, Rows, Step
from serve_app.quant.weight import DenseWeight, FusedWeight

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 72, 100, 61, 6, 2, 16, 2
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
ARGS = SimpleNamespace(n_layers=LAYERS, n_kv_heads=KV_HEADS, head_dim=HEAD_DIM)

Forward = Callable[["Parts", Step], Rows]


class Parts:
    """Random weights for a small family."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.embedding = self.matrix(VOCAB, HIDDEN)
        self.qkv = [FusedWeight([self.matrix(n * HEAD_DIM, HIDDEN) for n in (HEADS, KV_HEADS, KV_HEADS)]) for _ in "ab"]
        self.qkv_bias = torch.randn(QKV)
        self.out = [self.matrix(HIDDEN, HEADS * HEAD_DIM) for _ in "ab"]
        self.up = [self.matrix(2 * INNER, HIDDEN) for _ in "ab"]
        self.down = [self.matrix(HIDDEN, INNER) for _ in "ab"]
        self.wide_down = [self.matrix(HIDDEN, 2 * INNER) for _ in "ab"]
        self.bias = torch.randn(HIDDEN)
        self.norms = [torch.rand(HIDDEN) + 0.5 for _ in range(8)]
        self.rotary = Rotary(torch.rand(HEAD_DIM // 2), 512)
        self.partial = Rotary(torch.rand(3), 512)

    def matrix(self, rows: int, columns: int) -> DenseWeight:
        return DenseWeight(torch.randn(rows, columns) / columns**0.5)

    def rms(self, i: int, offset: float = 0.0) -> NormWeights:
        return NormWeights(self.norms[i], 1e-5, offset=offset)

    def layer_norm(self, i: int) -> NormWeights:
        return NormWeights(self.norms[i], 1e-5, self.bias, is_layer_norm=True)


def shape(layer: int, softcap: float = 0.0, window: int = 0) -> AttentionShape:
    return AttentionShape(layer, HEADS, KV_HEADS, HEAD_DIM, 0.25, softcap, window)


def windowed(p: Parts, step: Step) -> Rows:
    """As Mistral: a window in every second layer."""
    residual = step.embed(p.embedding)
    delta = None
    for i in range(LAYERS):
        x = step.norm(residual, p.rms(0)) if delta is None else step.add_norm(delta, residual, p.rms(0))
        qkv = step.linear(x, p.qkv[i], None)
        attended = step.attention(qkv, shape(i, window=7 if i else 0), p.rotary)
        x = step.add_norm(step.linear(attended, p.out[i], None), residual, p.rms(1))
        delta = step.linear(step.gate(step.linear(x, p.up[i], None), "silu"), p.down[i], None)
    return step.add_norm(delta, residual, p.rms(2))


def capped(p: Parts, step: Step) -> Rows:
    """As Gemma 2: scaled embedding, weights around 1, norms after attention and MLP, capped scores."""
    residual = step.embed(p.embedding, HIDDEN**0.5)
    for i in range(LAYERS):
        x = step.norm(residual, p.rms(0, 1.0))
        x = step.linear(step.attention(step.linear(x, p.qkv[i], None), shape(i, softcap=2.0), p.rotary), p.out[i], None)
        x = step.add_norm(step.norm(x, p.rms(1, 1.0)), residual, p.rms(2, 1.0))
        x = step.linear(step.gate(step.linear(x, p.up[i], None), "gelu_tanh"), p.down[i], None)
        step.add(residual, step.norm(x, p.rms(3, 1.0)))
    return step.norm(residual, p.rms(4, 1.0))


def parallel(p: Parts, step: Step) -> Rows:
    """As Phi-2: layer norms, biases, partial rotation, attention and an ungated MLP side by side."""
    residual = step.embed(p.embedding)
    for i in range(LAYERS):
        x = step.norm(residual, p.layer_norm(0))
        attended = step.linear(
            step.attention(step.linear(x, p.qkv[i], p.qkv_bias), shape(i), p.partial), p.out[i], p.bias
        )
        inner = step.activate(step.linear(x, p.up[i], None), "gelu_erf")
        step.add(residual, attended)
        step.add(residual, step.linear(inner, p.wide_down[i], p.bias))
    return step.norm(residual, p.layer_norm(1))


def head_norms(p: Parts, step: Step) -> Rows:
    """As Qwen 3: queries and keys normalised head by head; and no rotation at all in one layer."""
    residual = step.embed(p.embedding)
    q_norm, k_norm = (NormWeights(p.norms[i][:HEAD_DIM].contiguous(), 1e-6) for i in (5, 6))
    for i in range(LAYERS):
        qkv = step.linear(step.norm(residual, p.rms(0)), p.qkv[i], None)
        step.head_norm(qkv, 0, HEADS, q_norm)
        step.head_norm(qkv, HEADS, KV_HEADS, k_norm)
        attended = step.linear(step.attention(qkv, shape(i), p.rotary if i else None), p.out[i], None)
        step.scale(attended, 0.5)
        x = step.add_norm(attended, residual, p.rms(1))
        step.add(residual, step.linear(step.gate(step.linear(x, p.up[i], None), "gelu_erf"), p.down[i], None))
    return step.norm(residual, p.rms(2))


FAMILIES: list[Forward] = [windowed, capped, parallel, head_norms]


class Model:
    """A family of these parts. See CausalLM."""

    args: Any = ARGS

    def __init__(self, forward: Forward) -> None:
        self._parts = Parts()
        self._forward = forward

    def forward(self, step: Step) -> Rows:
        return self._forward(self._parts, step)

    def logits(self, hidden: Rows, step: Step) -> Rows:
        logits = step.linear(hidden, self._parts.embedding, None)
        step.softcap(logits, 3.0)
        return logits


IDS = [(i * 11) % VOCAB for i in range(90)]


def run(
    forward: Any, pool: Any, spans: Sequence[Sequence[tuple[int, int]]], rows: list[int] | None = None
) -> list[Tensor]:
    """Steps of spans, one for each request, over disjoint blocks."""
    results = []
    for step in spans:
        pieces = [Piece(IDS[r:] + IDS[:r], a, b, range(6 * r, 6 * r + 6)) for r, (a, b) in enumerate(step)]
        results.append(torch.as_tensor(forward(make_batch(pool, pieces, rows))).clone())
    return results


SPANS = [[(0, 40), (0, 3)], [(40, 41), (3, 60)], [(41, 42), (60, 61)]]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("rows", [None, [0, 1]], ids=["all logits", "the last ones"])
def test_a_program_computes_what_plain_torch_computes(family: Forward, rows: list[int] | None) -> None:
    model = Model(family)
    pools = [TinyPool(ARGS, 12, 16) for _ in range(2)]
    plain = run(TorchForward(model, pools[0], torch.device("cpu"), TorchAttention()), pools[0], SPANS, rows)
    native = run(choose_forward(model, pools[1], "cpu", is_exact=True), pools[1], SPANS, rows)
    for ours, theirs in zip(native, plain, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    for ours, theirs in zip((*pools[1].k, *pools[1].v), (*pools[0].k, *pools[0].v), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
def test_chunks_and_company_change_no_bit(family: Forward, dtype: torch.dtype) -> None:
    model = Model(family)
    pools = [TinyPool(ARGS, 12, 16, dtype) for _ in range(3)]
    one, many, both = (choose_forward(model, pool, "cpu") for pool in pools)
    whole = run(one, pools[0], [[(0, 75)]])[0]
    parts = run(many, pools[1], [[(0, 1)], [(1, 30)], [(30, 31)], [(31, 74)], [(74, 75)]])
    assert torch.equal(torch.cat(parts), whole)
    together = run(both, pools[2], [[(0, 50), (0, 75)], [(50, 75), (75, 76)]])
    assert torch.equal(torch.cat([together[0][:50], together[1][:25]]), whole)


def test_only_wanted_rows_are_computed_after_the_last_attention() -> None:
    model = Model(windowed)
    pool = TinyPool(ARGS, 12, 16)
    all_rows = run(choose_forward(model, pool, "cpu"), pool, [[(0, 40), (0, 30)]])[0]
    some = run(choose_forward(model, pool, "cpu"), pool, [[(0, 40), (0, 30)]], [0, 1])[0]
    assert torch.equal(some, all_rows[[39, 69]])
    tokens, wanted = record(model, pool, is_exact=False).bytes_per_row
    # The last layer's MLP and the head take memory only for wanted rows; buffers share their places.
    assert wanted >= 4 * (2 * INNER + VOCAB)
    assert tokens <= 4 * (HIDDEN + QKV + 4 * INNER + HEADS * HEAD_DIM) + 2048


def test_a_step_may_want_no_logits() -> None:
    model = Model(capped)
    pools = [TinyPool(ARGS, 12, 16) for _ in range(2)]
    forwards = [choose_forward(model, pool, "cpu") for pool in pools]
    batch = make_batch(pools[0], [Piece(IDS, 0, 40, range(6))], [])
    batch.logit_index = batch.logit_index[:0]
    assert forwards[0](batch).shape == (0, VOCAB)
    later = run(forwards[0], pools[0], [[(40, 50)]])[0]
    assert torch.equal(later, run(forwards[1], pools[1], [[(0, 40)], [(40, 50)]])[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_ids", VOCAB),
        ("token_ids", -1),
        ("positions", -1),
        ("positions", 10**6),
        ("slot_mapping", 12 * 16),
        ("slot_mapping", -1),
        ("block_tables", 12),
        ("block_tables", -1),
        ("context_lens", 500),
        ("query_start", 1),
        ("logit_index", 40),
        ("logit_index", -1),
    ],
)
def test_an_index_out_of_range_is_refused_before_anything_is_written(field: str, value: int) -> None:
    pool = TinyPool(ARGS, 12, 16)
    forward = choose_forward(Model(windowed), pool, "cpu")
    batch = make_batch(pool, [Piece(IDS, 0, 40, range(6))])
    getattr(batch, field).flat[0] = value
    with pytest.raises(IndexError):
        forward(batch)
    assert all(layer.isnan().all() for layer in (*pool.k, *pool.v))


def test_arrays_of_a_wrong_kind_are_refused() -> None:
    pool = TinyPool(ARGS, 12, 16)
    forward = choose_forward(Model(windowed), pool, "cpu")
    batch = make_batch(pool, [Piece(IDS, 0, 40, range(6))])
    batch.positions = batch.positions.astype("int32")
    with pytest.raises(TypeError):
        forward(batch)
    batch = make_batch(pool, [Piece(IDS, 0, 40, range(6))])
    batch.positions = batch.positions[:39]
    with pytest.raises(ValueError, match="length"):
        forward(batch)
