"""Every native op against its plain torch twin, in every instruction set of this CPU and every dtype."""

import random
from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch
from kernels.cpu import _native, ops
from kernels.formats import BY_NAME
from kernels.reference import norm as plain
from kernels.reference import sampling
from kernels.reference.attention import paged_attention, paged_decode
from kernels.reference.quant import dequantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DECODED = sorted(name for name, form in BY_NAME.items() if form.is_decodable)
BLOCK_TYPES = [name for name in DECODED if BY_NAME[name].is_block]


@pytest.fixture(params=_native.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(before)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_blocks(name: str, rows: int, columns: int) -> torch.Tensor:
    form = BY_NAME[name]
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.randint(0, 256, (rows, form.row_bytes(columns)), dtype=torch.uint8, generator=generator)
    if not form.is_block:
        plain_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        return randn(rows, columns, dtype=plain_dtype).view(torch.uint8)
    view = blocks.view(rows, -1, form.block_bytes)
    for field in ("d", "m", "dmin"):  # finite scales around 1/500, so that sums mean something
        if field in dict(form.fields):
            at = form.offset(field)
            scales = (torch.rand(view.shape[:2], generator=generator) / 500).half()
            view[..., at : at + 2] = scales.unsqueeze(-1).view(torch.uint8)
    return blocks


@pytest.mark.parametrize("name", DECODED)
def test_decoding_is_bit_exact(name: str) -> None:
    blocks = random_blocks(name, 7, 512)
    expected = dequantize(BY_NAME[name], blocks)
    assert expected.abs().sum() > 0
    got = dispatch.native_dequantize(BY_NAME[name].type_id)
    assert got is not None
    assert torch.equal(got(blocks).view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", ["F16", "BF16", *BLOCK_TYPES])
def test_decoding_of_any_bits_is_bit_exact(name: str) -> None:
    form = BY_NAME[name]
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, 256, (64, form.row_bytes(1024)), dtype=torch.uint8, generator=generator)
    expected, got = dequantize(form, blocks), ops.dequantize(form.type_id, blocks)
    is_nan = expected.isnan()  # processors choose a NaN's payload
    assert torch.equal(got.isnan(), is_nan)
    assert torch.equal(got[~is_nan].view(torch.int32), expected[~is_nan].view(torch.int32))


@pytest.mark.parametrize("name", DECODED)
def test_decoding_at_an_odd_address(name: str) -> None:
    blocks = random_blocks(name, 3, 512)
    storage = torch.empty(blocks.numel() + 1, dtype=torch.uint8)
    shifted = storage[1:].view(blocks.shape)
    shifted.copy_(blocks)
    assert torch.equal(ops.dequantize(BY_NAME[name].type_id, shifted), dequantize(name, blocks))


def test_types_without_a_native_decoder_say_so() -> None:
    assert dispatch.native_dequantize(BY_NAME["Q8_K"].type_id) is None
    assert dispatch.native_matmul(BY_NAME["Q8_K"].type_id) is None


@pytest.mark.parametrize("tokens", [1, 3, 8, 33])
@pytest.mark.parametrize(("name", "width"), [("F32", 173), ("F16", 172), ("Q8_0", 96), ("Q4_K", 2304), ("Q6_K", 256)])
def test_matmul(name: str, width: int, tokens: int, dtype: torch.dtype) -> None:
    blocks = random_blocks(name, 37, width)
    x = randn(tokens, width, dtype=dtype)
    expected = x.double() @ dequantize(BY_NAME[name], blocks).double().T
    got = ops.matmul(BY_NAME[name].type_id, x, blocks)
    assert got.dtype == dtype
    assert (got - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_matmul_of_a_token_does_not_depend_on_its_batch() -> None:
    blocks, x = random_blocks("Q8_0", 50, 1504), randn(33, 1504)
    whole = ops.matmul(8, x, blocks)
    for t in (0, 13, 32):
        assert torch.equal(ops.matmul(8, x[t : t + 1], blocks)[0], whole[t])


def test_matmul_writes_into_a_slice() -> None:
    blocks, x = random_blocks("Q8_0", 20, 64), randn(5, 64)
    wide = torch.zeros(5, 50)
    ops.matmul(8, x, blocks, wide[:, 10:30])
    assert torch.equal(wide[:, 10:30], ops.matmul(8, x, blocks))
    assert not wide[:, :10].any()
    assert not wide[:, 30:].any()


@pytest.mark.parametrize("width", [5, 64, 173])
def test_norms(width: int, dtype: torch.dtype) -> None:
    x, weight = randn(9, width, dtype=dtype), randn(width, seed=1)
    expected = plain.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected, rtol=TOLERANCE[dtype], atol=1e-5)
    residuals = [randn(9, width, dtype=dtype, seed=2) for _ in range(2)]
    expected = plain.add_rms_norm(x, residuals[0], weight, 1e-5)
    got = ops.add_rms_norm(x, residuals[1], weight, 1e-5)
    assert torch.equal(residuals[0], residuals[1])
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=1e-5)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (24, 24), (24, 10), (6, 2)])
def test_rope_in_a_fused_tensor(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    table = plain.rotary_table(torch.arange(50), torch.rand(rotary_dim // 2))
    positions = torch.tensor([0, 49, 7, 7, 20])
    fused = [randn(5, 6 + 2 + 2, head_dim, dtype=dtype) for _ in range(2)]
    for rope, heads in zip((plain.rope, ops.rope), fused, strict=True):
        rope(heads[:, :6], heads[:, 6:8], positions, table)
    torch.testing.assert_close(fused[1], fused[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(fused[1][:, 8:], randn(5, 10, head_dim, dtype=dtype)[:, 8:])


@pytest.mark.parametrize("width", [3, 64, 173])
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    gate_up = randn(7, 2 * width, dtype=dtype) * 30
    expected = plain.silu_mul(gate_up)
    torch.testing.assert_close(ops.silu_mul(gate_up), expected, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 24), (6, 6, 6), (20, 1, 40)])
def test_kv_write_and_attention(
    n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    contexts, queries, block_size = [1, 70, 33, 129, 64], [1, 40, 1, 1, 64], 16
    query_start = [0, 1, 41, 42, 43, 107]
    tables = torch.zeros(5, 9, dtype=torch.int32)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    for r, context in enumerate(contexts):
        count = -(-context // block_size)
        tables[r, :count], order = order[:count], order[count:]
    cache = randn(2, 40, block_size, n_kv_heads, head_dim, seed=3).to(kv_dtype)
    k_cache, v_cache = cache[0].clone(), cache[1].clone()
    heads = randn(107, n_heads + 2 * n_kv_heads, head_dim, dtype=dtype)
    q, k, v = heads.split([n_heads, n_kv_heads, n_kv_heads], dim=1)
    slots = torch.cat(
        [
            tables[r].long()[torch.arange(c - n, c) // block_size] * block_size + torch.arange(c - n, c) % block_size
            for r, (c, n) in enumerate(zip(contexts, queries, strict=True))
        ]
    )
    plain.kv_write(k, v, cache[0], cache[1], slots)
    ops.kv_write(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, cache[0])
    assert torch.equal(v_cache, cache[1])

    expected = paged_attention(q, k_cache, v_cache, tables, query_start, contexts)
    lens = torch.tensor(contexts, dtype=torch.int32)
    plan = ops.AttentionPlan(tables, torch.tensor(query_start, dtype=torch.int32), lens, 107, k_cache.shape, n_heads)
    got = plan.run(q.float(), k_cache, v_cache).to(dtype)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])

    last = torch.tensor(query_start[1:]) - 1
    decode = paged_decode(q[last], k_cache, v_cache, tables, lens)
    torch.testing.assert_close(decode, expected[last], rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


def test_uniform() -> None:
    seeds = torch.tensor([0, 1, -1, 2**62 + 12345])
    positions = torch.tensor([0, 7, 2**40, 100])
    assert torch.equal(ops.uniform(seeds, positions), sampling.uniform(seeds, positions))


@pytest.mark.parametrize("vocab", [1, 7, 500, 5000])
def test_draw_tokens(vocab: int) -> None:
    rows = 400
    r = random.Random(vocab)
    logits = randn(rows, vocab, seed=vocab) * 3
    logits[::7] = logits[::7].bfloat16().float()  # ties
    temperature = torch.tensor([r.choice([0.0, 0.3, 1.0, 2.5]) for _ in range(rows)])
    top_k = torch.tensor([r.choice([0, 0, 1, 2, 40, vocab]) for _ in range(rows)])
    top_p = torch.tensor([r.choice([1.0, 1.0, 0.0, 0.5, 0.9, 0.999]) for _ in range(rows)], dtype=torch.float64)
    min_p = torch.tensor([r.choice([0.0, 0.0, 0.01, 0.3, 1.0]) for _ in range(rows)], dtype=torch.float64)
    u = sampling.uniform(torch.arange(rows), torch.arange(rows))
    arguments = (logits, temperature, top_k, top_p, min_p, u)
    # The two round differently: where u falls on the border between two tokens, they may take either.
    expected, got = sampling.draw_tokens(*arguments), ops.draw_tokens(*arguments)
    assert (expected != got).sum() <= 1


def test_draw_tokens_of_broken_logits_stay_in_the_vocabulary() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan, nan], [-inf, -inf], [inf, 0.0], [-inf, 1.0], [nan, 1.0]])
    row = torch.ones(5)
    for top_p in (1.0, 0.5):
        rest = (torch.zeros(5, dtype=torch.int64), row.double() * top_p, row.double() * 0, row.double() * 0.9)
        for draw in (ops.draw_tokens, sampling.draw_tokens):
            ids = draw(logits, row, *rest)
            assert ((ids >= 0) & (ids < 2)).all()
            assert ids[3] == ids[4] == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_results(threads: int) -> None:
    blocks, x = random_blocks("Q4_0", 4099, 512), randn(40, 512)
    expected = ops.matmul(2, x, blocks)
    try:
        _native.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(ops.matmul(2, x, blocks), expected)
    finally:
        _native.set_num_threads(1)
