"""A mixture's products: pairs of token and choice by their experts' matrices, packed and plain, however they fall."""

import pytest
import torch
from planar_cases import matrix_and_weights
from torch import Tensor

from kernels.gpu import grouped_matmul, launch_shapes
from kernels.gpu.grouped_matmul import Matrix, combined, gated, multiply
from kernels.gpu.routing import Groups
from kernels.reference.norm import activate

ROWS = 36
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def random_choices(tokens: int, choices: int, num_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :choices].contiguous()


def one_takes_all(tokens: int, num_experts: int) -> Tensor:
    return torch.full((tokens, 1), num_experts // 2)


def experts_of(
    name: str, num_experts: int, rows: int, columns: int, device: torch.device, seed: int = 0
) -> tuple[Matrix, Tensor]:
    """The matrices one below the other, and their weights [E, rows, columns] in float32 on the CPU."""
    if name in PLAIN:
        generator = torch.Generator().manual_seed(seed)
        plain = torch.randn(num_experts * rows, columns, generator=generator).to(PLAIN[name])
        return plain.to(device), plain.float().view(num_experts, rows, columns)
    matrix, weights = matrix_and_weights(name, num_experts * rows, columns, device, seed)
    return matrix, weights.view(num_experts, rows, columns)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def products(weights: Tensor, x: Tensor, experts: Tensor) -> Tensor:
    """[pairs, rows] float64."""
    of_pair = x.double().repeat_interleave(experts.numel() // max(1, len(x)), dim=0)
    return torch.stack([weights[e].double() @ row for e, row in zip(experts.flatten(), of_pair, strict=True)])


def close(ours: Tensor, exact: Tensor) -> None:
    tolerance = 1e-5 if ours.dtype == torch.float32 else 1e-2
    assert ours.shape == exact.shape
    assert (ours.cpu().double() - exact).abs().max() <= tolerance * exact.abs().max()


CASES = {
    "one token": (5, random_choices(1, 2, 5)),
    "one expert": (1, random_choices(3, 1, 1)),
    "many tokens": (5, random_choices(41, 3, 5)),
    "experts without tokens": (8, torch.tensor([[6, 1], [1, 6], [6, 1]])),
    "one takes all, over several tiles": (8, one_takes_all(70, 8)),
}


EVERYWHERE = [("BF16", torch.bfloat16, case) for case in CASES]
EVERYWHERE += [("Q4_K", torch.float32, case) for case in ("one token", "one takes all, over several tiles")]
ONCE = [("Q8_0", torch.bfloat16), ("HQQ4", torch.float32), ("F32", torch.float32), ("F16", torch.float32)]


@pytest.mark.parametrize(
    ("name", "dtype", "case"), [*EVERYWHERE, *((*one, "experts without tokens") for one in ONCE)], ids=str
)
def test_each_token_by_its_experts(name: str, dtype: torch.dtype, case: str, device: torch.device) -> None:
    num_experts, experts = CASES[case]
    matrix, weights = experts_of(name, num_experts, ROWS, 256, device)
    x = randn(len(experts), 256, dtype=dtype)
    y = multiply(matrix, x.to(device), Groups.of(experts.to(device), num_experts))
    assert y.dtype == dtype
    close(y, products(weights, x, experts))


def test_odd_sizes_of_plain_experts_and_rows_that_are_strided(device: torch.device) -> None:
    matrix, weights = experts_of("F32", 4, 19, 37, device)
    experts, x = random_choices(7, 2, 4), randn(7, 50)[:, :37]
    close(multiply(matrix, x.to(device), Groups.of(experts.to(device), 4)), products(weights, x, experts))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("Q8_0", "Q8_0"), "silu"), (("Q8_0", "Q4_0"), "gelu_tanh"), (("BF16", "BF16"), "gelu_erf"),
        (("F16", "BF16"), "silu"),
    ],
    ids=str,
)  # fmt: skip
def test_gate_and_up_together(names: tuple[str, str], kind: str, device: torch.device) -> None:
    """One launch where both are of one type, three where they are not: the same numbers."""
    (gate, gate_weights), (up, up_weights) = (
        experts_of(name, 4, ROWS, 64, device, seed) for seed, name in enumerate(names)
    )
    experts, x = random_choices(9, 2, 4), randn(9, 64) * 0.3
    y = gated(gate, up, x.to(device), Groups.of(experts.to(device), 4), kind)
    exact = activate(products(gate_weights, x, experts), kind).double() * products(up_weights, x, experts)
    close(y, exact)


@pytest.mark.parametrize(
    ("name", "dtype", "split"),
    [("Q6_K", torch.float32, 3), ("BF16", torch.bfloat16, 1)],
    ids=str,
)
def test_sums_over_the_choices(
    name: str, dtype: torch.dtype, split: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts the columns are cut in, more than there are steps too."""
    shape = launch_shapes.LaunchShape("tile", 16, 64, 8 if name == "Q6_K" else 256, split, 4, 1)
    monkeypatch.setattr(grouped_matmul, "grouped_shape", lambda *sizes, has_two: shape)
    down, weights = experts_of(name, 5, ROWS, 512, device)
    experts = random_choices(4, 3, 5).sort(-1).values
    inner, factors = randn(12, 512, dtype=dtype), torch.rand(4, 3, generator=torch.Generator().manual_seed(2))
    groups = Groups.of(experts.to(device), 5)
    y = combined(down, inner.to(device), groups, factors.to(device))
    exact = products(weights, inner, experts).view(4, 3, ROWS)
    assert y.dtype == dtype
    close(y, (exact * factors.double().unsqueeze(-1)).sum(1))
    assert torch.equal(combined(down, inner.to(device), groups, factors.to(device)), y)


def test_neighbours_do_not_matter(device: torch.device) -> None:
    """With the tiles that a number of tokens gives, a token's result is the same whoever the others are."""
    matrix, _ = experts_of("Q4_K", 4, ROWS, 256, device)
    experts, x = random_choices(6, 2, 4), randn(6, 256)
    y = multiply(matrix, x.to(device), Groups.of(experts.to(device), 4)).view(6, 2, ROWS)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    other = multiply(matrix, x[order].to(device), Groups.of(experts[order].to(device), 4)).view(6, 2, ROWS)
    assert torch.equal(other, y[order.to(device)])


def test_no_tokens(device: torch.device) -> None:
    matrix, _ = experts_of("Q5_0", 2, ROWS, 64, device)
    groups = Groups.of(torch.zeros(0, 2, dtype=torch.int64, device=device), 2)
    nothing = torch.empty(0, 64, device=device)
    assert multiply(matrix, nothing, groups).shape == gated(matrix, matrix, nothing, groups, "silu").shape == (0, ROWS)
    assert combined(matrix, nothing, groups, torch.empty(0, 2, device=device)).shape == (0, ROWS)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "Q2_K", "Q3_K", "Q5_K", "HQQ8", "F16", "F32"])
@pytest.mark.parametrize(("tokens", "choices", "num_experts"), [(1, 8, 8), (130, 2, 3), (33, 6, 64), (200, 1, 2)])
def test_more_groups(name: str, tokens: int, choices: int, num_experts: int, device: torch.device) -> None:
    matrix, weights = experts_of(name, num_experts, ROWS, 512, device)
    experts, x = random_choices(tokens, choices, num_experts), randn(tokens, 512)
    close(multiply(matrix, x.to(device), Groups.of(experts.to(device), num_experts)), products(weights, x, experts))
