"""Every native op against its plain torch twin, in every instruction set of this CPU and every dtype."""

import random
from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch
from kernels.cpu import _native, ops
from kernels.formats import BY_NAME
from kernels.reference import sampling
from kernels.reference.encode import encode
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
    if name in ("Q8_1", "Q8_K", "FP8", "HQQ4", "HQQ8"):  # any bits of float32 scales would be of any size
        return encode(name, randn(rows, columns))
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.randint(0, 256, (rows, form.row_bytes(columns)), dtype=torch.uint8, generator=generator)
    if not form.is_block:
        plain_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        return randn(rows, columns, dtype=plain_dtype).view(torch.uint8)
    view = blocks.view(rows, -1, form.block_bytes)
    for field in ("d", "m", "dmin"):  # finite scales around 1/500, so that sums mean something
        if field in dict(form.fields):
            at, size = form.offset(field), dict(form.fields)[field]
            dtype = torch.half if size == 2 else torch.float
            scales = (torch.rand(view.shape[:2], generator=generator) / 500).to(dtype)
            view[..., at : at + size] = scales.unsqueeze(-1).view(torch.uint8)
    if name == "FP8":
        view[..., form.offset("qs") :] &= 0xFE  # the codes of NaN are odd
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
    assert dispatch.native_dequantize(BY_NAME["Q1_0"].type_id) is None
    assert dispatch.native_matmul(BY_NAME["Q1_0"].type_id) is None


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
