"""Encoders: natively and in torch, against ggml's own bytes, the gguf package, and each other."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu import _native
from kernels.cpu.quantize import quantize_rows
from kernels.formats import BY_NAME
from kernels.reference.encode import ENCODABLE, encode
from kernels.reference.quant import dequantize

DATA = Path(__file__).parents[1] / "data" / "quantization"
GOLDEN = np.load(DATA / "ggml_quantize_golden.npz")
PLAIN = {"F32", "F16", "BF16"}
HQQ = {"HQQ4", "HQQ8"}
NATIVE = sorted(ENCODABLE - PLAIN)
EXACT = sorted(ENCODABLE - PLAIN - HQQ)
OF_PACKAGE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
CASES = [key for key in GOLDEN.files if key.removesuffix("_imatrix") in ENCODABLE]


def native(type_name: str, x: Tensor, importance: Tensor | None = None) -> Tensor:
    return quantize_rows(type_name, "F32", x.contiguous().view(torch.uint8).view(len(x), -1), importance)


def rows_of_many_kinds(columns: int, seed: int) -> Tensor:
    """Bell-shaped, heavy-tailed, flat, sparse, tiny, large, far from zero, few levels, zeros of both signs."""
    r = np.random.default_rng(seed)
    normal = r.standard_normal
    rows = [
        normal(columns) * 0.02,
        r.standard_t(2, columns),
        np.full(columns, -0.7),
        np.zeros(columns),
        normal(columns) * 1e-38,
        normal(columns) * 1e-6,
        normal(columns) * 1e4,
        normal(columns) * (r.random(columns) < 0.05),
        r.integers(-3, 4, columns),
        -r.random(columns) - 100,
        np.where(r.random(columns) < 0.5, -0.0, 0.0),
        normal(columns) * np.exp(normal(columns) * 4) * 1e-3,
    ]
    return torch.from_numpy(np.array(rows, np.float32))


def importance_of(columns: int, seed: int) -> Tensor:
    values = np.random.default_rng(seed).random(columns).astype(np.float32) ** 4
    values[::37] = 0
    return torch.from_numpy(values)


def golden(key: str) -> tuple[str, Tensor, Tensor | None, NDArray[np.uint8]]:
    importance = torch.from_numpy(GOLDEN["imatrix_f32"]) if key.endswith("_imatrix") else None
    return key.removesuffix("_imatrix"), torch.from_numpy(GOLDEN["source_f32"]), importance, GOLDEN[key]


@pytest.mark.parametrize("key", CASES)
def test_native_bytes_are_ggmls(key: str, each_isa: str) -> None:
    name, x, importance, expected = golden(key)
    np.testing.assert_array_equal(native(name, x, importance).numpy(), expected)


@pytest.mark.parametrize("key", CASES)
def test_torch_bytes_are_ggmls(key: str) -> None:
    name, x, importance, expected = golden(key)
    np.testing.assert_array_equal(encode(name, x, importance).numpy(), expected)


@pytest.mark.parametrize("name", OF_PACKAGE)
def test_bytes_are_those_of_the_gguf_package(name: str, each_isa: str) -> None:
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((64, 1024)).astype(np.float32) * 0.05)
    expected = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(native(name, x).numpy(), expected)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_native_and_torch_agree_bit_for_bit(name: str, is_weighted: bool, each_isa: str) -> None:
    x = rows_of_many_kinds(768, seed=5)
    if name == "Q8_1":
        x[6] *= 0.01  # the sum of a block must fit float16
    importance = importance_of(768, seed=6) if is_weighted else None
    np.testing.assert_array_equal(native(name, x, importance).numpy(), encode(name, x, importance).numpy())


@pytest.mark.parametrize("name", NATIVE)
def test_bits_depend_neither_on_threads_nor_on_the_instruction_set(name: str, one_thread_after: None) -> None:
    x = torch.from_numpy(np.random.default_rng(8).standard_normal((301, 512)).astype(np.float32))
    before, found = _native.instruction_set(), []
    for isa in _native.instruction_sets():
        _native.use_instruction_set(isa)
        for count in (1, 3):
            _native.set_num_threads(count)
            found.append(native(name, x))
    _native.use_instruction_set(before)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("source", ["F16", "BF16", "Q8_0"])
def test_rows_of_another_type_are_decoded_on_the_way(source: str) -> None:
    x = torch.from_numpy(np.random.default_rng(9).standard_normal((37, 512)).astype(np.float32))
    packed = encode(source, x)
    assert torch.equal(quantize_rows("Q4_K", source, packed), native("Q4_K", dequantize(source, packed)))


@settings(max_examples=30)
@given(
    st.sampled_from(EXACT),
    st.integers(0, 2**32 - 1),
    st.floats(-12, 3),
    st.booleans(),
)
def test_native_and_torch_agree_on_any_rows(name: str, seed: int, power: float, is_weighted: bool) -> None:
    r = np.random.default_rng(seed)
    x = torch.from_numpy((r.standard_normal((3, 256)) * 10**power * r.integers(0, 3, 256)).astype(np.float32))
    importance = importance_of(256, seed) if is_weighted else None
    assert torch.equal(native(name, x, importance), encode(name, x, importance))


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *(("Q2_K", 0.35), ("Q3_K", 0.18), ("Q4_K", 0.08), ("Q5_K", 0.04), ("Q6_K", 0.022), ("Q8_0", 0.006)),
        *(("Q8_1", 0.006), ("Q8_K", 0.008), ("FP8", 0.03), ("HQQ4", 0.1), ("HQQ8", 0.007), ("MXFP4", 0.14)),
        *(("Q4_0", 0.1), ("Q5_1", 0.05)),
    ],
)
def test_what_is_decoded_is_near_what_was_encoded(name: str, most: float) -> None:
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((16, 1024)).astype(np.float32))
    error = dequantize(name, native(name, x)) - x
    assert float(error.norm() / x.norm()) < most


def test_importance_lowers_the_weighted_error() -> None:
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((8, 1024)).astype(np.float32))
    importance = importance_of(1024, seed=3)
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        plain, weighted = (
            float((importance * (dequantize(name, native(name, x, i)) - x) ** 2).sum()) for i in (None, importance)
        )
        assert weighted < plain, name


@pytest.mark.parametrize("name", sorted(HQQ))
def test_hqq_codes_are_the_solvers(name: str, each_isa: str) -> None:
    """Sums in another order move zeros in their last places: a code that lies between two may turn over."""
    x = torch.from_numpy(np.random.default_rng(4).standard_normal((256, 1024)).astype(np.float32) * 0.03)
    ours, theirs = native(name, x), encode(name, x)
    form = BY_NAME[name]
    codes = [b.view(-1, form.block_bytes)[:, 8:].int() for b in (ours, theirs)]
    if name == "HQQ4":
        codes = [torch.cat([c & 15, c >> 4], dim=1) for c in codes]
    difference = (codes[0] - codes[1]).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) <= 1e-3
    errors = [float((dequantize(name, b) - x).norm()) for b in (ours, theirs)]
    assert errors[0] <= 1.001 * errors[1]


@pytest.mark.parametrize("kind", ["small", "heavy"])
@pytest.mark.parametrize("bits", [4, 8])
def test_hqq_is_that_of_its_authors(bits: int, kind: str, each_isa: str) -> None:
    check_hqq(bits, kind, native)


@pytest.mark.parametrize("kind", ["small", "heavy"])
@pytest.mark.parametrize("bits", [4, 8])
def test_hqq_in_torch_is_that_of_its_authors(bits: int, kind: str) -> None:
    check_hqq(bits, kind, encode)


def check_hqq(bits: int, kind: str, encoder: Callable[..., torch.Tensor]) -> None:
    """Heavy weights are lost by more than the solver shrinks away, so that its norm and the growth of beta count."""
    golden = np.load(DATA / "hqq_golden.npz")
    x = torch.from_numpy(golden[kind])
    step, zero, codes = (torch.from_numpy(golden[f"{kind}_{bits}_{part}"]) for part in ("step", "zero", "codes"))
    theirs = (codes.float() - zero) * step
    blocks = encoder(f"HQQ{bits}", x)
    ours = dequantize(f"HQQ{bits}", blocks).view(-1, 64)
    numbers = blocks.view(-1, BY_NAME[f"HQQ{bits}"].block_bytes)[:, :8].contiguous().view(torch.float32)
    found = (ours / numbers[:, :1] + numbers[:, 1:]).round()
    difference = (found - codes).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) <= 1e-3
    weights = x.view(-1, 64)
    assert float((ours - weights).norm()) <= 1.001 * float((theirs - weights).norm())
    torch.testing.assert_close(numbers[:, 1:], zero, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NATIVE)
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    x = torch.zeros(70, 512)
    x[41, 300] = value
    with pytest.raises(ValueError, match="row 41 has a value that is not finite"):
        native(name, x)
    with pytest.raises(ValueError, match="row 41 has a value that is not finite"):
        encode(name, x)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "HQQ4", "HQQ8"])
def test_scales_too_large_for_float16_are_refused(name: str) -> None:
    x = torch.zeros(5, 256)
    x[3, 7] = 1e30
    x[3, 8] = -3e38
    for make in (native, encode):
        with pytest.raises(ValueError, match=rf"row 3 has values too large for {name}"):
            make(name, x)


def test_an_importance_must_fit() -> None:
    x = torch.zeros(2, 256)
    with pytest.raises(ValueError, match="importance has shape"):
        native("Q4_K", x, torch.ones(128))
    with pytest.raises(ValueError, match="finite and not negative"):
        native("Q4_K", x, -torch.ones(256))
    with pytest.raises(ValueError, match="no whole number of Q4_K blocks"):
        native("Q4_K", torch.zeros(2, 96))
