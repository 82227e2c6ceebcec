"""Plain torch's rotation and writes against their definitions: they are the oracle of all kernels."""

import math

import pytest
import torch

from kernels.reference.attention import paged_attention, paged_decode
from kernels.reference.norm import kv_write, rope, rotary_table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pairs_turn_as_complex_numbers_do(dtype: torch.dtype) -> None:
    frequencies, positions = torch.tensor([1.0, 0.1, 0.01]), torch.tensor([0, 3, 50])
    table = rotary_table(torch.arange(60), frequencies)
    q, k = torch.randn(3, 2, 8).to(dtype), torch.randn(3, 1, 8).to(dtype)
    expected = []
    for x in (q, k):
        pairs = x[..., :6].double()
        a, b = pairs[..., :3], pairs[..., 3:]
        angles = positions[:, None, None].double() * frequencies.double()
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
        expected.append(torch.cat([turned.real, turned.imag, x[..., 6:].double()], -1))
    rope(q, k, positions, table)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for x, right in zip((q, k), expected, strict=True):
        torch.testing.assert_close(x.double(), right, rtol=tolerance, atol=tolerance)


def test_e4m3_writes_divide_by_the_scale_and_saturate() -> None:
    caches = [torch.zeros(2, 16, 2, 4).to(torch.float8_e4m3fn) for _ in "kv"]
    x = torch.tensor([[[1.0, -2.0, 1000.0, math.nan], [0.3, 448.0, -1e9, 0.0]]])
    scales = torch.tensor([1.0, 0.5])
    kv_write(x, x, *caches, torch.tensor([17]), scales, scales)
    got = caches[0].float()[1, 1]
    assert got[0, :3].tolist() == [1.0, -2.0, 448.0]
    assert got[0, 3].isnan()
    assert got[1].tolist() == [0.625, 448.0, -448.0, 0.0]
    assert not caches[1].float()[0].any()


def test_scales_multiply_what_the_cache_holds() -> None:
    torch.manual_seed(0)
    k_cache, v_cache = (torch.randn(3, 16, 2, 8) for _ in "kv")
    k_scale, v_scale = torch.tensor([0.5, 3.0]), torch.tensor([2.0, 0.1])
    q, tables = torch.randn(3, 4, 8), torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    scaled = [k_cache * k_scale.unsqueeze(-1), v_cache * v_scale.unsqueeze(-1)]
    ours = paged_attention(q, k_cache, v_cache, tables, [0, 2, 3], [20, 7], k_scale=k_scale, v_scale=v_scale)
    torch.testing.assert_close(ours, paged_attention(q, *scaled, tables, [0, 2, 3], [20, 7]))
    lengths = torch.tensor([20, 7])
    ours = paged_decode(q[:2], k_cache, v_cache, tables, lengths, k_scale=k_scale, v_scale=v_scale)
    torch.testing.assert_close(ours, paged_decode(q[:2], *scaled, tables, lengths))
