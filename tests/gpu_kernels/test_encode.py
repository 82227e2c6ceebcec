"""Encoders on a device: the reference's bytes, and its refusals."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from encode_cases import importance_of, wild_rows
from torch import Tensor

from kernels.formats import BY_NAME
from kernels.gpu import encode as on_device
from kernels.gpu.encode_search import IN_TRITON
from kernels.gpu.encode_simple import ENCODERS, _rounded_up
from kernels.reference import encode as reference
from kernels.reference.encode_search import IN_TORCH, Affine, Searches
from serve_app.errors import ModelFileError
from serve_app.loaders.checkpoint import Recoding, StoredTensor
from serve_app.loaders.recode import blocks_of

COLUMNS = 256
AFFINE = [("Q2_K", False), ("Q4_K", False), ("Q5_K", False), ("Q4_1", True), ("Q4_K", True)]
"""Types, and whether columns count differently; the others with importance take the same ways at night."""
SEARCHED = sorted(on_device._SEARCHED)


def same_bytes(name: str, x: Tensor, importance: Tensor | None, device: torch.device) -> bool:
    made = on_device.encode(name, x.to(device), importance)
    assert made.device.type == device.type
    return torch.equal(made.cpu(), reference.encode(name, x.float(), importance))


@pytest.mark.parametrize("name", ENCODERS)
def test_types_with_one_scale(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of several rows; of all types of numbers."""
    monkeypatch.setattr(on_device, "PIECE_WEIGHTS", 7 * COLUMNS)
    rows = wild_rows(COLUMNS)
    assert same_bytes(name, rows, None, device)
    for dtype in (torch.bfloat16, torch.float16):
        assert same_bytes(name, rows.clamp(-60000, 60000).to(dtype), None, device)


@pytest.mark.parametrize("name", ["Q3_K", "Q6_K"])
def test_symmetric_super_blocks(name: str, device: torch.device) -> None:
    assert same_bytes(name, wild_rows(COLUMNS), None, device)


def shortened(searches: Searches) -> Searches:
    """Two inverse scales instead of up to 37, which take the interpreter long."""

    def search_affine(
        x: Tensor, w: Tensor, top: int, first: float, step: float, _: int, *, is_absolute: bool = False
    ) -> Affine:
        return searches.search_affine(x, w, top, first, step, 1, is_absolute=is_absolute)

    return replace(searches, search_affine=search_affine)


@pytest.mark.parametrize(("name", "is_weighted"), AFFINE)
def test_scales_with_minima(name: str, device: torch.device, *, is_weighted: bool) -> None:
    importance = importance_of(COLUMNS) if is_weighted else None
    encoder: Callable[..., Tensor] = on_device._SEARCHED[name]
    rows = wild_rows(COLUMNS)
    expected = encoder(rows, importance, shortened(IN_TORCH))
    counts = None if importance is None else importance.to(device)
    assert torch.equal(encoder(rows.to(device), counts, shortened(IN_TRITON)).cpu(), expected)


def few_weights() -> tuple[Tensor, Tensor]:
    """Sub-blocks of three weights, [3, sub-blocks], and how much they count: the same numbers, few operations."""
    return wild_rows(COLUMNS)[:, :255].reshape(-1, 3).t().contiguous(), importance_of(COLUMNS)[:3].repeat(1445, 1).t()


def test_every_inverse_scale_of_a_minimum_and_a_scale(device: torch.device) -> None:
    x, w = few_weights()
    w = w.contiguous()
    expected = IN_TORCH.search_affine(x, w, 15, -0.9, 0.05, 36)
    found = IN_TRITON.search_affine(x.to(device), w.to(device), 15, -0.9, 0.05, 36)
    for field in ("scale", "minimum", "inverse", "base"):
        actual = getattr(found, field).cpu()
        assert torch.equal(actual.view(torch.int32), getattr(expected, field).view(torch.int32)), field


@pytest.mark.parametrize("search", ["search_symmetric", "quantise_scales"])
def test_searches_for_one_scale(search: str, device: torch.device) -> None:
    x, w = few_weights()
    w = w.contiguous()
    x = x.abs() if search == "quantise_scales" else x
    expected = getattr(IN_TORCH, search)(x, w, 16)
    found = getattr(IN_TRITON, search)(x.to(device), w.to(device), 16)
    assert [torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)] == [True, True]


@pytest.mark.nightly
@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_whole_searches(name: str, device: torch.device, *, is_weighted: bool) -> None:
    rows = torch.cat([wild_rows(2 * COLUMNS, seed) for seed in range(3)])
    assert same_bytes(name, rows, importance_of(2 * COLUMNS) if is_weighted else None, device)


def test_powers_of_two_of_mxfp4() -> None:
    """Just below a power of two the logarithm is the power's, where float32 does not tell them apart."""
    rounded_up = (1 << 23) - _rounded_up(torch.device("cpu"))
    assert rounded_up[127 + 1] == 0
    assert rounded_up[127 + 100] > rounded_up[127 + 10] > 0


def test_powers_of_two(device: torch.device) -> None:
    powers = torch.arange(1, 255, dtype=torch.int32).unsqueeze(1) << 23
    near = (powers + torch.arange(-16, 16, dtype=torch.int32)).clamp(min=1).view(torch.float32)
    rows = torch.zeros(254, 32, 32)
    rows[:, :, 9] = near
    for name in ("MXFP4", "FP8"):
        assert same_bytes(name, rows.view(254, -1), None, device)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Q4_0", float("nan"), "row 2 has a value that is not finite"),
        ("Q6_K", float("-inf"), "row 2 has a value that is not finite"),
        ("Q8_0", 1e30, "row 2 has values too large for Q8_0: a float16 scale ends at 65504"),
        ("Q4_1", 3e38, "row 2 has values too large for Q4_1"),
    ],
)
def test_refused_values(name: str, value: float, message: str, device: torch.device) -> None:
    x = torch.ones(4, COLUMNS, device=device)
    x[2, 77] = value
    with pytest.raises(ValueError, match=message):
        on_device.encode(name, x)


def test_refused_sizes_and_types(device: torch.device) -> None:
    assert on_device.encode("Q4_0", torch.ones(0, COLUMNS, device=device)).shape == (0, 144)
    with pytest.raises(ValueError, match="33 weights are no whole number of Q4_0 blocks of 32"):
        on_device.encode("Q4_0", torch.ones(1, 33, device=device))
    with pytest.raises(ValueError, match="not negative"):
        on_device.encode("Q4_0", torch.ones(1, 32, device=device), -torch.ones(32))
    with pytest.raises(KeyError, match="HQQ4"):
        on_device.encode("HQQ4", torch.ones(1, 64, device=device))


def stored(x: Tensor, name: str, **how: object) -> StoredTensor:
    """bfloat16 numbers that are to be quantised while they are loaded."""
    data = x.bfloat16().view(torch.uint8).numpy().reshape(-1)
    recoding = Recoding(BY_NAME["BF16"], **how)  # type: ignore[arg-type]
    return StoredTensor("m.gguf", "t", BY_NAME[name], tuple(x.shape), data, None, recoding)


def loaded(tensor: StoredTensor, device: torch.device | None) -> Tensor:
    return torch.cat([blocks.cpu().clone() for _, blocks in blocks_of(tensor, device=device)])


@pytest.fixture
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are only given to Triton where it is asked to."""
    monkeypatch.setenv("SIROCCO_TRITON", "1")


@pytest.mark.usefixtures("in_triton")
def test_loading_with_importance_and_a_shift(device: torch.device) -> None:
    """The order of rows is kept too."""
    tensor = stored(wild_rows(COLUMNS), "Q4_0", importance=importance_of(COLUMNS), shift=1.0)
    tensor = replace(tensor, row_order=torch.randperm(17, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(loaded(tensor, device), loaded(tensor, None))


@pytest.mark.usefixtures("in_triton")
def test_loading_experts_in_pieces(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.loaders.recode.PIECE_WEIGHTS", 16 * COLUMNS)
    tensor = stored(wild_rows(6 * COLUMNS).view(3, -1, COLUMNS), "Q8_0")
    firsts = [first for first, _ in blocks_of(tensor, device=device)]
    assert firsts == [0, 16, 32, 34, 50, 66, 68, 84, 100]
    assert torch.equal(loaded(tensor, device), loaded(tensor, None))


@pytest.mark.usefixtures("in_triton")
def test_loading_names_the_tensor_that_cannot_be_encoded(device: torch.device) -> None:
    x = torch.ones(3, COLUMNS)
    x[1, 1] = np.nan
    with pytest.raises(ModelFileError, match=r"m\.gguf: tensor 't': row 1 has a value that is not finite"):
        loaded(stored(x, "Q5_1"), device)
