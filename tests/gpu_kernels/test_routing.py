"""Routing and grouping on the device against plain torch."""

import pytest
import torch
from torch import Tensor

from kernels.gpu import routing
from kernels.gpu.routing import Groups, route
from kernels.reference.routing import route as reference

ROUTINGS = [
    ("softmax", 2, False, 0.0),
    ("softmax", 3, True, 0.0),
    ("softmax", 1, True, 0.0),
    ("softmax", 7, False, 0.0),
    ("sparsemixer", 2, False, 0.01),
    ("sparsemixer", 2, False, 0.4),
]


@pytest.mark.parametrize("arguments", ROUTINGS, ids=str)
def test_experts_and_factors_are_plain_torchs(arguments: tuple[str, int, bool, float], device: torch.device) -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) * 3
    # Equal ones, at the top and below, negative ones alone, and very large ones.
    logits[0], logits[1, 2:5], logits[2], logits[3] = 0.5, 4.0, -3.0, logits[3] * 1e4
    experts, factors = route(logits.to(device), *arguments)
    right_experts, right_factors = reference(logits, *arguments)
    assert torch.equal(experts.cpu().long(), right_experts)
    torch.testing.assert_close(factors.cpu(), right_factors, rtol=1e-5, atol=1e-7)


def test_many_experts_and_rows_that_are_strided(device: torch.device) -> None:
    logits = torch.randn(33, 140, generator=torch.Generator().manual_seed(1))[:, :129]
    experts, factors = route(logits.to(device), "softmax", 8, True)
    right_experts, right_factors = reference(logits, "softmax", 8, True)
    assert torch.equal(experts.cpu().long(), right_experts)
    torch.testing.assert_close(factors.cpu(), right_factors, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["softmax", "sparsemixer"])
def test_experts_are_experts_whatever_the_logits_are(kind: str, bad: float, device: torch.device) -> None:
    """A row of a broken request must not send another's product out of the matrix."""
    experts, _ = route(torch.full((3, 5), bad, device=device), kind, 2)
    assert [row.unique().numel() for row in experts] == [2, 2, 2]
    assert experts.min() >= 0
    assert experts.max() < 5


def test_no_tokens(device: torch.device) -> None:
    experts, factors = route(torch.empty(0, 5, device=device), "softmax", 2)
    assert experts.shape == factors.shape == (0, 2)


def check_groups(experts: Tensor, num_experts: int, device: torch.device) -> Groups:
    groups = Groups.of(experts.to(device), num_experts)
    counts = torch.bincount(experts.flatten(), minlength=num_experts)
    tiles = (counts + groups.tokens - 1) // groups.tokens
    assert torch.equal(groups.who.cpu().long(), experts.flatten().argsort(stable=True))
    for found, right in ((groups.starts, counts), (groups.tile_starts, tiles)):
        assert found.tolist() == [0, *right.cumsum(0).tolist()]
    assert int(tiles.sum()) <= groups.num_tiles
    return groups


def test_groups(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = check_groups(torch.tensor([[3, 0], [3, 1], [0, 3]]), 5, device)
    assert groups.who.tolist() == [1, 4, 3, 0, 2, 5]
    assert groups.tokens == 16
    check_groups(torch.zeros(0, 2, dtype=torch.int64), 3, device)
    check_groups(torch.zeros(1, 1, dtype=torch.int32), 1, device)
    check_groups(torch.full((100, 1), 2), 3, device)
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(0, 6, (150, 4), generator=generator, dtype=torch.int32)
    assert check_groups(experts, 6, device).tokens == 64
    # As pairs are counted and placed on a GPU: in several chunks.
    monkeypatch.setattr(routing, "MOST_COMPARED", 16 * 8)
    monkeypatch.setattr(routing, "MOST_PLACED", 32)
    check_groups(experts[:20], 6, device)
    check_groups(experts[:20] % 4, 4, device)
