import pytest
import torch
from torch import Tensor

from kernels.gpu.dense_gemv import MOST_TOKENS, matmul
from serve_app.quant.weight import DenseWeight


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 70, 172), (3, 33, 300), (4, 5, 64), (2, 1, 1)])
def test_products(tokens: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    x, matrix = randn(tokens, columns, dtype=dtype), randn(rows, columns, dtype=dtype, seed=1)
    y = matmul(x.to(device), matrix.to(device)).cpu()
    exact = x.double() @ matrix.double().t()
    error = (y.double() - exact).abs()
    magnitudes = x.double().abs() @ matrix.double().abs().t()
    assert y.dtype == dtype
    assert (error <= 2**-20 * magnitudes + torch.finfo(dtype).eps * exact.abs()).all()


def test_no_rows_of_either_kind(device: torch.device) -> None:
    matrix = torch.ones(4, 8, device=device)
    assert matmul(matrix[:0], matrix).shape == (0, 4)
    assert matmul(matrix, matrix[:0]).shape == (4, 0)


def test_neighbours_do_not_matter(device: torch.device) -> None:
    x = randn(MOST_TOKENS, 300, dtype=torch.bfloat16).to(device)
    matrix = randn(40, 300, dtype=torch.bfloat16, seed=1).to(device)
    together = matmul(x, matrix)
    for tokens in (1, 2, 3):
        assert torch.equal(matmul(x[:tokens], matrix), together[:tokens])


def test_dense_weights_use_it_for_few_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIROCCO_TRITON", "1")
    matrix = randn(40, 300, dtype=torch.float32).to(device)
    weight = DenseWeight(matrix)
    x = randn(MOST_TOKENS + 1, 300, dtype=torch.float32, seed=1).to(device)
    assert torch.equal(weight.matmul(x[:3]), matmul(x[:3], matrix))
    assert torch.equal(weight.matmul(x), torch.nn.functional.linear(x, matrix))
