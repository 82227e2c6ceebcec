"""Rotation and the write of keys and values, against plain torch bit by bit where nothing is rounded differently."""

import pytest
import torch
from torch import Tensor

from kernels.gpu.kv_write import rope_kv
from kernels.reference import norm as reference
from kernels.reference.norm import rotary_table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CACHES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def fused_rows(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    torch.manual_seed(tokens)
    return torch.randn(tokens, heads, head_dim).to(dtype).to(device)


def caches(blocks: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.full((blocks, 16, n_kv_heads, head_dim), 7.0).to(dtype).to(device) for _ in "kv"]


def scattered_slots(tokens: int, blocks: int, device: torch.device) -> Tensor:
    return torch.randperm(blocks * 16, generator=torch.Generator().manual_seed(1))[:tokens].to(device)


def write(k: Tensor, v: Tensor, *where: Tensor) -> None:
    """Without a rotation: queries and positions do not count then."""
    rope_kv(k, k, v, where[2], None, *where)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_alone_gives_torchs_bytes(dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device) -> None:
    rows = fused_rows(33, 6, 24, dtype, device) * 30
    k, v = rows[:, 2:4], rows[:, 4:]
    slots = scattered_slots(33, 4, device)
    scales = [torch.tensor([0.5, 0.03], device=device), torch.tensor([0.01, 1.0], device=device)]
    ours, theirs = caches(4, 2, 24, cache_dtype, device), caches(4, 2, 24, cache_dtype, device)
    write(k, v, *ours, slots, *scales)
    reference.kv_write(k, v, *theirs, slots, *scales)
    assert same_bytes(ours[0], theirs[0])
    assert same_bytes(ours[1], theirs[1])


def test_e4m3_rounds_and_saturates_as_torch_does(device: torch.device) -> None:
    special = torch.tensor([0.0, -0.0, 448.0, 449.0, 1e9, -1e9, torch.inf, -torch.inf, torch.nan, 2**-9, 2**-10, 1e-30])
    steps = torch.arange(0, 256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (steps[:-1] + steps[1:]) / 2
    x = torch.cat([special, steps, middles, middles * (1 + 2**-20), torch.randn(2000) * 10, torch.randn(500) * 0.01])
    x = x[: len(x) // 16 * 16].view(-1, 1, 16).to(device)
    ours, theirs = (caches(200, 1, 16, torch.float8_e4m3fn, device) for _ in range(2))
    one, slots = torch.ones(1, device=device), torch.arange(len(x), device=device)
    write(x, x, *ours, slots, one, one)
    reference.kv_write(x, x, *theirs, slots, one, one)
    wrong = ours[0].view(torch.uint8) != theirs[0].view(torch.uint8)
    # The sign of a NaN has no meaning.
    assert not (wrong & ~theirs[0].float().isnan()).any()
    assert torch.equal(ours[0].float().isnan(), theirs[0].float().isnan())


@pytest.mark.parametrize("rotary_dim", [24, 8, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_and_write_in_one(dtype: torch.dtype, rotary_dim: int, device: torch.device) -> None:
    n_heads, n_kv_heads, head_dim, tokens = 5, 2, 24, 40
    table = rotary_table(torch.arange(300), torch.rand(rotary_dim // 2)).to(device)
    positions = torch.randint(0, 300, (tokens,), generator=torch.Generator().manual_seed(3)).to(device)
    slots = scattered_slots(tokens, 5, device)
    rows = fused_rows(tokens, n_heads + 2 * n_kv_heads, head_dim, dtype, device)
    other = rows.clone()
    ours, theirs = caches(5, n_kv_heads, head_dim, dtype, device), caches(5, n_kv_heads, head_dim, dtype, device)
    q, k, v = rows.split([n_heads, n_kv_heads, n_kv_heads], dim=1)
    rope_kv(q, k, v, positions, table, *ours, slots)
    assert same_bytes(k, other[:, n_heads : n_heads + n_kv_heads])
    q2, k2, v2 = other.split([n_heads, n_kv_heads, n_kv_heads], dim=1)
    reference.rope(q2, k2, positions, table)
    reference.kv_write(k2, v2, *theirs, slots)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(q, q2, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert same_bytes(ours[1], theirs[1])
    # Elements past rotary_dim, and slots of nobody, are untouched.
    assert same_bytes(q[..., rotary_dim:], q2[..., rotary_dim:])
    assert same_bytes(ours[0][..., rotary_dim:], theirs[0][..., rotary_dim:])


def test_tokens_without_a_slot_are_not_written(device: torch.device) -> None:
    k = fused_rows(4, 1, 16, torch.float32, device)
    ours = caches(2, 1, 16, torch.float32, device)
    write(k, k, *ours, torch.tensor([-1, 3, -1, 20], device=device))
    flat = ours[0].view(-1, 16)
    assert torch.equal(flat[[3, 20]], k[[1, 3], 0])
    assert torch.equal(
        flat.sum(1) == 7 * 16, torch.ones(32, dtype=torch.bool).index_fill(0, torch.tensor([3, 20]), False).to(device)
    )


def test_no_tokens(device: torch.device) -> None:
    k = fused_rows(0, 2, 16, torch.float32, device)
    ours = caches(1, 2, 16, torch.float32, device)
    write(k, k, *ours, torch.zeros(0, dtype=torch.int64, device=device))
    assert (ours[0] == 7).all()
