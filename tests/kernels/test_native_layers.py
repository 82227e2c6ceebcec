"""The operations between the matrix products against plain torch, in every instruction set."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kernels.cpu import _native, layers
from kernels.reference import norm as plain
from kernels.reference.kv import decode_q8, encode_q8, q8_row_bytes

pytestmark = pytest.mark.usefixtures("each_isa")
each = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
widths = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 173, 255, 256, 257, 896, 1000])
rows = st.integers(0, 5)
F32, BF16, Q8_32, Q8_256 = range(4)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shifted(x: Tensor) -> Tensor:
    """The same numbers at an address that is a multiple of 4 and not of 8, as rows in a wider tensor."""
    wide = torch.full((x.shape[0], x.shape[1] + 3), 7.0)
    wide[:, 1 : 1 + x.shape[1]] = x
    return wide[:, 1 : 1 + x.shape[1]]


def act_buffer(kind: int, tokens: int, width: int) -> Tensor:
    """At a multiple of 64 bytes, full of bytes that must be overwritten or stay unread."""
    row = _native.act_row_bytes(kind, width)
    memory = torch.full((tokens * row + 64,), 0x55, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + tokens * row].view(tokens, row)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@each
@given(tokens=rows, width=widths, seed=st.integers(0, 99))
def test_rms_norm(tokens: int, width: int, seed: int) -> None:
    x, weight = randn(tokens, width, seed=seed) * 5, randn(width, seed=seed + 1)
    expected = plain.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(layers.norm(shifted(x), weight, 1e-5), expected, rtol=2e-6, atol=2e-6)
    gemma = plain.rms_norm(x, weight + 1.0, 1e-5)
    torch.testing.assert_close(layers.norm(x, weight, 1e-5, weight_offset=1.0), gemma, rtol=2e-6, atol=2e-6)


@each
@given(tokens=rows, width=widths, has_bias=st.booleans())
def test_layer_norm(tokens: int, width: int, has_bias: bool) -> None:
    x, weight, bias = randn(tokens, width) * 3 + 10, randn(width, seed=1), randn(width, seed=2)
    expected = functional.layer_norm(x.double(), (width,), weight.double(), bias.double() if has_bias else None, 1e-5)
    got = layers.norm(x, weight, 1e-5, bias=bias if has_bias else None, is_layer_norm=True)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("width", [5, 64, 300])
def test_norm_with_a_residual(width: int) -> None:
    x, residual, weight = randn(4, width), randn(4, width, seed=1), randn(width, seed=2)
    after = residual.clone()
    got = layers.norm(shifted(x), weight, 1e-6, residual=after)
    assert torch.equal(after, residual + x)
    torch.testing.assert_close(got, plain.rms_norm(residual + x, weight, 1e-6), rtol=2e-6, atol=2e-6)
    again = layers.norm(None, weight, 1e-6, residual=after)
    assert same(again, got)
    assert torch.equal(after, residual + x)
    assert same(layers.norm(after, weight, 1e-6, out=after), got)  # in place


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_breaks_no_other(bad: float) -> None:
    x, weight = randn(3, 70), randn(70, seed=1)
    expected = layers.norm(x, weight, 1e-5)
    x[1, 33] = bad
    got = layers.norm(x, weight, 1e-5)
    assert same(got[::2], expected[::2])
    assert got[1].isnan().any()
    torch.testing.assert_close(got[1], plain.rms_norm(x, weight, 1e-5)[1], equal_nan=True)


def exact(x: Tensor, kind: str) -> Tensor:
    """In float64: torch's own float32 loses the digits of small results."""
    if kind == "silu":
        return functional.silu(x.double())
    return functional.gelu(x.double(), approximate="tanh" if kind == "gelu_tanh" else "none")


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize("width", [1, 17, 256, 700])
def test_activations(kind: str, width: int) -> None:
    gate_up = randn(6, 2 * width) * 4
    gate_up[0, 0], gate_up[1, 0], gate_up[2, 0] = 90.0, -90.0, 0.0
    expected = exact(gate_up[:, :width], kind) * gate_up[:, width:]
    torch.testing.assert_close(layers.activate(shifted(gate_up), kind).double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(plain.gate(gate_up, kind).double(), expected, rtol=2e-6, atol=2e-5)
    alone = layers.activate(gate_up, kind, is_gated=False)
    torch.testing.assert_close(alone.double(), exact(gate_up, kind), rtol=2e-6, atol=2e-6)
    assert layers.activate(gate_up[:0], kind).shape == (0, width)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu_erf"])
def test_activations_of_all_magnitudes(kind: str) -> None:
    x = torch.cat((torch.linspace(-20, 20, 40001), torch.logspace(-30, 12, 601), -torch.logspace(-30, 12, 601)))
    got, expected = layers.activate(x.unsqueeze(0), kind, is_gated=False)[0].double(), exact(x, kind)
    assert ((got - expected).abs() <= 2e-6 * expected.abs().clamp(min=0.2)).all()
    got = layers.activate(torch.tensor([[math.nan, math.inf]]), kind, is_gated=False)[0]
    assert got[0].isnan()
    assert got[1] == math.inf


@pytest.mark.parametrize("count", [0, 1, 15, 16, 100])
def test_small_operations(count: int) -> None:
    x, y = randn(count) * 40, randn(count, seed=1)
    capped, sums, scaled = x.clone(), x.clone(), x.clone()
    layers.softcap(capped, 30.0)
    layers.add(sums, y)
    layers.scale(scaled, 1.7)
    torch.testing.assert_close(capped, 30.0 * torch.tanh(x / 30.0), rtol=1e-6, atol=1e-6)
    assert torch.equal(sums, x + y)
    assert torch.equal(scaled, x * torch.tensor(1.7))


def test_tanh_of_all_magnitudes() -> None:
    x = torch.cat((torch.linspace(-12, 12, 40001), torch.logspace(-30, 30, 601), torch.tensor([-math.inf, math.inf])))
    got = x.clone()
    layers.softcap(got, 1.0)
    expected = torch.tanh(x.double())
    assert ((got.double() - expected).abs() <= 5e-7 * expected.abs()).all()
    nan = torch.tensor([math.nan])
    layers.softcap(nan, 1.0)
    assert nan.isnan().all()


@each
@given(tokens=rows, width=widths, kinds=st.lists(st.sampled_from([F32, BF16, Q8_32, Q8_256]), min_size=1, max_size=2))
def test_operations_fill_activations_as_convert_does(tokens: int, width: int, kinds: list[int]) -> None:
    x, weight = randn(tokens, 2 * width) * 3, randn(width)

    def acts() -> list[tuple[int, Tensor]]:
        return [(kind, act_buffer(kind, tokens, width)) for kind in kinds]

    for op in (
        lambda a: layers.norm(x[:, :width], weight, 1e-5, acts=a),
        lambda a: layers.norm(x[:, :width], weight, 1e-5, residual=randn(tokens, width), acts=a, is_layer_norm=True),
        lambda a: layers.activate(x, acts=a),
    ):
        filled, wanted = acts(), acts()
        layers.convert(shifted(op(filled)), wanted)
        for (_, a), (_, b) in zip(filled, wanted, strict=True):
            assert torch.equal(a, b)


def test_activations_in_float32_and_bfloat16_are_the_numbers_and_zeros() -> None:
    x = randn(3, 70)
    wide, half = act_buffer(F32, 3, 70), act_buffer(BF16, 3, 70)
    layers.convert(x, [(F32, wide), (BF16, half)])
    assert torch.equal(wide.view(torch.float32)[:, :128], functional.pad(x, (0, 58)))
    assert torch.equal(half.view(torch.bfloat16)[:, :128], functional.pad(x, (0, 58)).bfloat16())


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (16, 16), (24, 24), (24, 10), (6, 2), (128, 64)])
def test_rope_and_append_in_one(head_dim: int, rotary_dim: int) -> None:
    table = plain.rotary_table(
        torch.arange(50), torch.rand(rotary_dim // 2, generator=torch.Generator().manual_seed(1))
    )
    positions, slots = torch.tensor([0, 49, 7, 7, 20]), torch.tensor([3, 0, 31, 8, 9])
    fused, expected = randn(5, 10, head_dim), randn(5, 10, head_dim)
    plain.rope(expected[:, :6], expected[:, 6:8], positions, table)
    caches = torch.zeros(2, 4, 8, 2, head_dim)
    layers.rope_kv(
        fused[:, :6], fused[:, 6:8], fused[:, 8:], table=table, positions=positions, slots=slots,
        k_cache=caches[0], v_cache=caches[1],
    )  # fmt: skip
    torch.testing.assert_close(fused, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(caches[0].view(32, 2, head_dim)[slots], fused[:, 6:8])
    assert torch.equal(caches[1].view(32, 2, head_dim)[slots], fused[:, 8:])
    untouched = [s for s in range(32) if s not in slots.tolist()]
    assert not caches.view(2, 32, -1)[:, untouched].any()


@each
@given(
    head_dim=st.integers(1, 130),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8]),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e4, 1e8]),
)
def test_append_rounds_as_torch_does(head_dim: int, dtype: torch.dtype, scale: float) -> None:
    k, v = randn(3, 2, head_dim) * scale, randn(3, 2, head_dim, seed=1) * scale
    row = q8_row_bytes(head_dim) if dtype == torch.uint8 else head_dim
    caches = torch.zeros(2, 2, 4, 2, row, dtype=dtype)
    slots = torch.tensor([5, 0, 7])
    layers.rope_kv(None, k, v, k_cache=caches[0], v_cache=caches[1], slots=slots)
    for x, cache in ((k, caches[0]), (v, caches[1])):
        expected = encode_q8(x) if dtype == torch.uint8 else x.to(dtype)
        assert same(cache.view(8, 2, row)[slots], expected)


def test_append_of_broken_values() -> None:
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -0.0] * 8).view(1, 1, 40)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cache = torch.zeros(1, 1, 1, 40, dtype=dtype)
        layers.rope_kv(None, bad.clone(), bad.clone(), k_cache=cache, v_cache=cache.clone(), slots=torch.tensor([0]))
        torch.testing.assert_close(cache.view(40).float(), bad.view(40), equal_nan=True)
    cache = torch.zeros(1, 1, 1, 44, dtype=torch.uint8)
    bad[..., 32:] = 2.0
    layers.rope_kv(None, bad, bad, k_cache=cache, v_cache=cache.clone(), slots=torch.tensor([0]))
    decoded = decode_q8(cache.view(44), 40)
    assert decoded[:32].isnan().all()
    torch.testing.assert_close(decoded[32:], torch.full((8,), 2.0), rtol=1e-3, atol=0)


@each
@given(x=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=70))
def test_8_bit_rows_are_off_by_at_most_half_a_scale(x: list[float]) -> None:
    row = torch.tensor(x, dtype=torch.float32).view(1, 1, -1)
    cache = torch.zeros(1, 1, 1, q8_row_bytes(len(x)), dtype=torch.uint8)
    layers.rope_kv(None, row, row, k_cache=cache, v_cache=cache.clone(), slots=torch.tensor([0]))
    decoded = decode_q8(cache.view(-1), len(x))
    for begin in range(0, len(x), 32):
        block, largest = row.view(-1)[begin : begin + 32], row.view(-1)[begin : begin + 32].abs().max()
        bound = largest.double() / 254 * (1 + 2**-9) + 2**-25
        assert ((decoded[begin : begin + 32].double() - block.double()).abs() <= bound).all()


def test_threads_and_neighbours_do_not_change_rows(one_thread_after: None) -> None:
    x, weight = randn(600, 1500), randn(750, seed=1)
    expected = [layers.norm(x[:, :750], weight, 1e-5), layers.activate(x)]
    _native.set_num_threads(3)
    for at in (slice(0, 600), slice(17, 18), slice(100, 333)):
        assert same(layers.norm(x[at, :750], weight, 1e-5), expected[0][at])
        assert same(layers.activate(x[at]), expected[1][at])


@pytest.mark.parametrize(("kind", "count"), [(4, 1), (-1, 1), (0, 3)])
def test_activation_outputs_that_do_not_exist_are_refused(kind: int, count: int) -> None:
    x = torch.zeros(1, 64)
    with pytest.raises(IndexError, match="activation"):
        _native.convert(x.data_ptr(), 64, 1, 64, [(kind, act_buffer(0, 1, 64).data_ptr())] * count)
