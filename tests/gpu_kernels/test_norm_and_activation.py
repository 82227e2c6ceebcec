"""Norms and activation functions against plain torch."""

import pytest
import torch

from kernels.gpu import activation, norm
from kernels.reference import norm as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (3, 64), (7, 100), (1, 4097), (130, 33)]


def close(ours: torch.Tensor, theirs: torch.Tensor, least: float = 3e-6) -> None:
    tolerance = {torch.float32: least, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[theirs.dtype]
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def rows(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    torch.manual_seed(width)
    return (torch.randn(tokens, width) * 3).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), SIZES)
def test_norms(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = rows(tokens, width, dtype, device), rows(tokens, width, dtype, device).flip(0)
    weight, bias = torch.rand(width, device=device) + 0.5, torch.randn(width, device=device)
    close(norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    close(norm.rms_norm(x, weight, 1e-5, offset=1.0), reference.rms_norm(x, weight + 1, 1e-5))
    close(norm.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))
    close(norm.layer_norm(x, weight, None, 1e-5), reference.layer_norm(x, weight, None, 1e-5))
    ours, theirs = residual.clone(), residual.clone()
    close(norm.add_rms_norm(x, ours, weight, 1e-5), reference.add_rms_norm(x, theirs, weight, 1e-5))
    assert torch.equal(ours, theirs)
    ours = residual.clone()
    close(norm.layer_norm(x, weight, bias, 1e-5, residual=ours), reference.layer_norm(theirs, weight, bias, 1e-5))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_normalised_in_place(dtype: torch.dtype, device: torch.device) -> None:
    fused = rows(9, 6 * 16, dtype, device).view(9, 6, 16)
    other, weight = fused.clone(), torch.rand(16, device=device)
    heads = fused[:, 1:4]
    norm.rms_norm(heads, weight, 1e-6, out=heads)
    other[:, 1:4] = reference.rms_norm(other[:, 1:4], weight, 1e-6)
    close(fused, other)
    assert torch.equal(fused[:, [0, 4, 5]], other[:, [0, 4, 5]])


@pytest.mark.parametrize("kind", activation.KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype: torch.dtype, kind: str, device: torch.device) -> None:
    for tokens, width in SIZES:
        x = rows(tokens, 2 * width, dtype, device)
        # 1 + erf(x) loses its leading bits on the far left, in both.
        close(activation.gate(x, kind), reference.gate(x, kind), 1e-5)
        left = x[:, :width]
        close(activation.activate(left, kind), reference.activate(left, kind), 1e-5)


@pytest.mark.parametrize("kind", activation.KINDS)
def test_activations_of_large_numbers(kind: str, device: torch.device) -> None:
    x = torch.tensor([[-1e4, -100.0, -20.0, 20.0, 100.0, 1e4]], device=device)
    close(activation.activate(x, kind), reference.activate(x, kind))


def test_no_rows(device: torch.device) -> None:
    x, weight = torch.empty(0, 8, device=device), torch.ones(8, device=device)
    assert norm.rms_norm(x, weight, 1e-5).shape == (0, 8)
    assert activation.gate(x, "silu").shape == (0, 4)
