"""Products with planar matrices against float64 sums of the reference's weights, in each of the three regimes.

The tolerance: in float32 an element may be off by 2^-20 of the sum of its terms' magnitudes, sixteen roundings of them
all. In 16 bits it may be off by twice what plain torch is off by, which multiplies the decoded weights in that dtype,
and by a rounding of the result.
"""

import pytest
import torch
from planar_cases import TYPES, columns_of, matrix_and_weights
from torch import Tensor

from kernels.gpu import launch_shapes, quant_matmul
from kernels.gpu.launch_shapes import LaunchShape
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PLANAR
from kernels.gpu.quant_matmul import matmul

ROWS = 70
TOKENS = (1, 3, 8, 9, 64, 65)


def activations(tokens: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(matrix: PlanarMatrix, weights: Tensor, x: Tensor, shape: LaunchShape | None = None) -> Tensor:
    """Multiplies and compares; returns what came out."""
    y = matmul(matrix, x.to(matrix.device), shape)
    assert y.dtype == x.dtype
    assert y.shape == (len(x), matrix.rows)
    exact = x.double() @ weights.double().t()
    error = (y.cpu().double() - exact).abs()
    if x.dtype == torch.float32:
        assert (error <= 2**-20 * (x.double().abs() @ weights.double().abs().t()) + 1e-30).all()
    else:
        plain = (x @ weights.to(x.dtype).t()).double()
        ulp = torch.finfo(x.dtype).eps * exact.abs().max()
        assert error.max() <= 2 * (plain - exact).abs().max() + ulp / 2
    return y


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", TYPES)
def test_each_type_in_each_regime(name: str, tokens: int, device: torch.device) -> None:
    matrix, weights = matrix_and_weights(name, ROWS, columns_of(name, 3 * 96), device)
    check(matrix, weights, activations(tokens, matrix.columns, torch.float32))


@pytest.mark.parametrize("tokens", [1, 3, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "HQQ4"])
def test_sixteen_bits(name: str, dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    matrix, weights = matrix_and_weights(name, ROWS, 512, device)
    check(matrix, weights, activations(tokens, 512, dtype) / 16)


@pytest.mark.parametrize("tokens", [2, pytest.param(8, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", ["Q4_K", "Q5_0", "Q3_K"])
def test_gemv_with_several_rows_and_split_columns(name: str, tokens: int, device: torch.device) -> None:
    matrix, weights = matrix_and_weights(name, 21, 768, device)
    shape = LaunchShape("gemv", tokens, rows=16, vectors=4, split=2, warps=1, stages=1)
    check(matrix, weights, activations(tokens, 768, torch.float32), shape)


@pytest.mark.parametrize("name", ["Q4_K", pytest.param("Q8_0", marks=pytest.mark.nightly)])
def test_tiles_with_split_columns(name: str, device: torch.device) -> None:
    matrix, weights = matrix_and_weights(name, 33, 768, device)
    shape = LaunchShape("tile", 16, rows=16, vectors=2, split=4, warps=4, stages=3)
    check(matrix, weights, activations(17, 768, torch.bfloat16), shape)


def test_scratch_piece_by_piece(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    matrix, weights = matrix_and_weights("Q5_1", ROWS, 96, device)
    monkeypatch.setattr(quant_matmul, "SCRATCH_BYTES", 4 * 96 * 30)
    check(matrix, weights, activations(66, 96, torch.float32))


def test_no_rows(device: torch.device) -> None:
    matrix, _ = matrix_and_weights("Q4_K", 5, 256, device)
    assert matmul(matrix, torch.empty(0, 256, device=device)).shape == (0, 5)
    nothing = PlanarMatrix(PLANAR["Q4_K"], 0, 256, device)
    assert matmul(nothing, torch.ones(3, 256, device=device)).shape == (3, 0)


@pytest.mark.parametrize("tokens", [2, 5, 33])
def test_neighbours_do_not_matter(tokens: int, device: torch.device) -> None:
    """A row among as many others has the same bits wherever it stands and whatever they are."""
    matrix, _ = matrix_and_weights("Q4_K", 40, 512, device)
    x = activations(tokens, 512, torch.bfloat16).to(device)
    y = matmul(matrix, x)
    others = activations(tokens, 512, torch.bfloat16, seed=9).to(device)
    others[0] = x[tokens - 1]
    assert torch.equal(matmul(matrix, others)[0], y[tokens - 1])


@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_the_same_bits_again(tokens: int, device: torch.device) -> None:
    matrix, _ = matrix_and_weights("Q6_K", 40, 512, device)
    x = activations(tokens, 512, torch.bfloat16).to(device)
    assert torch.equal(matmul(matrix, x), matmul(matrix, x))


def test_a_view_of_wider_rows(device: torch.device) -> None:
    matrix, weights = matrix_and_weights("Q8_0", 17, 128, device)
    wide = activations(3, 400, torch.float32)
    check(matrix, weights, wide[:, 100:228])


def test_nothing_finite_is_made_of_what_is_not(device: torch.device) -> None:
    matrix, _ = matrix_and_weights("Q4_K", 20, 256, device)
    for tokens in (1, 9):
        x = activations(tokens, 256, torch.float32)
        x[0, 17] = torch.inf
        y = matmul(matrix, x.to(device)).cpu()
        assert not y[0].isfinite().any()
        assert y[1:].isfinite().all()


def test_shapes_from_the_table(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    matrix, weights = matrix_and_weights("Q8_0", 33, 256, device)
    entry = {"Q8_0 33x256": {"4": ["gemv", 4, 8, 4, 2, 1, 1]}}
    monkeypatch.setattr(launch_shapes, "table", lambda: {launch_shapes.device_key(device): entry})
    launch_shapes.launch_shape.cache_clear()
    found = launch_shapes.launch_shape(matrix.form, 33, 256, 4, torch.bfloat16, device)
    assert found == LaunchShape("gemv", 4, rows=8, vectors=4, split=2, warps=1, stages=1)
    check(matrix, weights, activations(3, 256, torch.bfloat16))
    launch_shapes.launch_shape.cache_clear()


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 33, 64, 200])
@pytest.mark.parametrize("name", TYPES)
def test_larger_products(name: str, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    matrix, weights = matrix_and_weights(name, 300, columns_of(name, 2048) + columns_of(name, 1), device)
    check(matrix, weights, activations(tokens, matrix.columns, dtype) / 16)
