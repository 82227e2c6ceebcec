"""The small operations between the matrix products in plain torch: the oracle, and what runs without native code.

They run on any device. Sums, squares and rotations are formed in float32 whatever the dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional

E4M3_LARGEST = 448.0


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [T, H], weight [H] float32 → x / rms(x) * weight, [T, H] in x's dtype."""
    return functional.rms_norm(x.float(), weight.shape, weight, epsilon).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Adds x to residual in place, then normalises the sum; all [T, H]."""
    residual += x
    return rms_norm(residual, weight, epsilon)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """x [T, H], weight and bias [H] float32 → (x - mean) / deviation * weight + bias, [T, H] in x's dtype."""
    return functional.layer_norm(x.float(), weight.shape, weight, bias, epsilon).to(x.dtype)


def rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> None:
    """Rotates q [T, n_heads, head_dim] and k [T, n_kv_heads, head_dim] in place, first half against second half.

    table float32 [positions, rotary_dim]: cosines of the first half, sines in the second. positions [T] int64.
    Elements past rotary_dim stay. Source: Su et al. 2021, whose order is interleaved, each even element against the odd
    one after it; checkpoints of Hugging Face have the halves.
    """
    half = table.shape[1] // 2
    cosine, sine = torch.split_with_sizes(table.index_select(0, positions).unsqueeze(1), [half, half], dim=-1)
    for x in (q, k):
        first, second = x[..., :half], x[..., half : 2 * half]
        a, b = first.float(), second.float()
        # Both before either is written: float32 halves are views of x.
        rotated = (a * cosine - b * sine, b * cosine + a * sine)
        first.copy_(rotated[0])
        second.copy_(rotated[1])


def activate(x: Tensor, kind: str) -> Tensor:
    """x [T, I] → silu, gelu_erf (by the error function) or gelu_tanh (its usual approximation) of x."""
    y = x.float()
    if kind == "silu":
        y = functional.silu(y)
    else:
        y = functional.gelu(y, approximate="tanh" if kind == "gelu_tanh" else "none")
    return y.to(x.dtype)


def gate(gate_up: Tensor, kind: str) -> Tensor:
    """gate_up [T, 2 * I] → activate(gate) * up, [T, I]."""
    left, right = gate_up.float().chunk(2, dim=-1)
    return (activate(left, kind) * right).to(gate_up.dtype)


def kv_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """k, v [T, n_kv_heads, head_dim] into slots [T] int64 of caches [num_blocks, block_size, n_kv_heads, head_dim].

    Caches of float8_e4m3fn hold x / scale, k_scale and v_scale float32 [n_kv_heads], None = 1; what is beyond 448
    becomes 448.
    """
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        rows = cache.view(-1, *cache.shape[2:])
        if cache.dtype == torch.float8_e4m3fn:
            y = x.float() if scale is None else x.float() * (1.0 / scale).unsqueeze(-1)
            # Bytes: torch copies rows of this type by index on some devices only.
            rows, x = rows.view(torch.uint8), y.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(cache.dtype).view(torch.uint8)
        rows.index_copy_(0, slots, x.to(rows.dtype))


def rotary_table(positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """positions [P], inverse_frequencies [rotary_dim / 2] float32 → float32 [P, rotary_dim]: cosines, then sines."""
    angles = positions.to(torch.float32).unsqueeze(1) * inverse_frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)
