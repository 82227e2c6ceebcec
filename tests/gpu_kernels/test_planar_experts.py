"""Groups of pairs times their experts' matrices, in one launch."""

import pytest
import torch
from planar_cases import matrix_and_weights
from torch import Tensor

from kernels.gpu.quant_matmul import Groups, gather_matmul

ROWS = 36


def expected(weights: Tensor, x: Tensor, experts: Tensor) -> Tensor:
    """[pairs, ROWS] float64."""
    by_expert = weights.double().view(-1, ROWS, weights.shape[1])
    of_pair = x.double().repeat_interleave(experts.numel() // max(1, len(x)), dim=0)
    return torch.einsum("pk,pnk->pn", of_pair, by_expert[experts.flatten()])


def check(name: str, num_experts: int, x: Tensor, experts: Tensor, device: torch.device) -> Tensor:
    matrix, weights = matrix_and_weights(name, num_experts * ROWS, x.shape[1], device)
    groups = Groups.of(experts.to(device), num_experts)
    y = gather_matmul(matrix, x.to(device), groups)
    exact = expected(weights, x, experts)
    assert y.shape == exact.shape
    assert (y.cpu().double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    return y


def random_choices(tokens: int, choices: int, num_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :choices].contiguous()


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "HQQ4"])
def test_each_token_by_its_experts(name: str, device: torch.device) -> None:
    x = torch.randn(11, 256, generator=torch.Generator().manual_seed(1))
    check(name, 5, x, random_choices(11, 2, 5), device)


def test_experts_without_tokens_and_with_more_than_a_tile(device: torch.device) -> None:
    x = torch.randn(60, 64, generator=torch.Generator().manual_seed(1))
    experts = torch.full((60, 1), 2)
    experts[50:] = 5
    check("Q8_0", 8, x, experts, device)


def test_a_row_for_each_choice(device: torch.device) -> None:
    """The second product of an expert: its input are the pairs' own rows."""
    experts = random_choices(7, 3, 4)
    check("Q8_0", 4, torch.randn(21, 128, generator=torch.Generator().manual_seed(1)), experts, device)


def test_one_token_one_expert_and_none(device: torch.device) -> None:
    check("Q5_0", 1, torch.ones(1, 64), torch.zeros(1, 1, dtype=torch.int64), device)
    check("Q5_0", 3, torch.ones(1, 64), torch.tensor([[2, 0]]), device)
    matrix, _ = matrix_and_weights("Q5_0", 2 * ROWS, 64, device)
    groups = Groups.of(torch.zeros(0, 2, dtype=torch.int64, device=device), 2)
    assert gather_matmul(matrix, torch.empty(0, 64, device=device), groups).shape == (0, ROWS)


def test_the_plan(device: torch.device) -> None:
    groups = Groups.of(torch.tensor([[3, 0], [3, 1], [0, 3]], device=device), 5)
    assert groups.who.tolist() == [1, 4, 3, 0, 2, 5]
    assert groups.starts.tolist() == [0, 2, 3, 3, 6, 6]
    assert groups.tile_starts.tolist() == [0, 1, 2, 2, 3, 3]
    assert groups.num_tiles >= 3


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "Q2_K", "HQQ8"])
@pytest.mark.parametrize(("tokens", "choices", "num_experts"), [(1, 8, 8), (130, 2, 3), (33, 6, 64), (200, 1, 2)])
def test_more_groups(name: str, tokens: int, choices: int, num_experts: int, device: torch.device) -> None:
    x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1))
    check(name, num_experts, x, random_choices(tokens, choices, num_experts), device)
