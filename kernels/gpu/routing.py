"""Which experts a step's tokens take, and which expert then multiplies what: on the device, one launch each."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import IS_INTERPRETED, require_device
from kernels.gpu.launch_shapes import MOST_TILE_TOKENS

LEAST_TILE_TOKENS = 16
"""The narrowest tile that tensor cores multiply."""

MOST_COMPARED = 1 << 20 if IS_INTERPRETED else 8192
"""Pairs times experts that a program compares at once, where it counts all of them."""

MOST_PLACED = 1 << 20 if IS_INTERPRETED else 2048
"""Pairs that a program compares at once with its own expert."""


@triton.jit
def _route(
    logits, experts, factors, num_tokens, logits_stride, two_jitter,
    NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    IS_SPARSEMIXER: tl.constexpr, IS_RENORMALISED: tl.constexpr,
):  # fmt: skip
    """A program: ROWS tokens. Experts come out ascending: their places follow from counting, nothing is sorted."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    is_expert = (row < num_tokens) & (lane < NUM_EXPERTS)
    found = tl.load(logits + row.to(tl.int64) * logits_stride + lane, mask=is_expert, other=0.0)
    # Larger than the mark of what is taken, whatever it is: so TOP_K different experts are found even among NaN.
    x = tl.where(found > -3.0e38, found, -3.0e38)
    left = tl.where(lane < NUM_EXPERTS, x, float("-inf"))
    weights = tl.exp(left - tl.max(left, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    is_taken = lane < 0
    for _ in tl.static_range(TOP_K):
        # Of equal logits the first.
        here = lane == tl.argmax(left, axis=1)[:, None]
        if IS_SPARSEMIXER:
            largest = tl.max(left, axis=1)[:, None]
            is_far = (largest - x) / tl.maximum(tl.abs(x), largest) > two_jitter
            near = tl.sum(tl.where(is_far, 0.0, tl.exp(left - largest)), axis=1)[:, None]
            weights = tl.where(here, 1.0 / near, weights)
        is_taken = is_taken | here
        left = tl.where(here, float("-inf"), left)
    if IS_RENORMALISED:
        weights = weights / tl.sum(tl.where(is_taken, weights, 0.0), axis=1)[:, None]
    at = row * TOP_K + tl.cumsum(is_taken.to(tl.int32), axis=1) - 1
    tl.store(experts + at, lane + tl.zeros_like(at), mask=is_taken & (row < num_tokens))
    tl.store(factors + at, weights, mask=is_taken & (row < num_tokens))


def route(
    logits: Tensor, kind: str, top_k: int, is_renormalised: bool = False, jitter: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See reference.routing.route; logits float32 [T, E], experts are int32."""
    num_tokens, num_experts = logits.shape
    assert logits.dtype == torch.float32, "router logits are float32"
    assert logits.stride(1) == 1, "rows must be contiguous"
    assert top_k <= num_experts
    experts = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)
    factors = torch.empty(num_tokens, top_k, device=logits.device)
    if num_tokens == 0:
        return experts, factors
    require_device(logits)
    width = triton.next_power_of_2(num_experts)
    rows = max(1, (65536 if IS_INTERPRETED else 1024) // width)
    is_sparsemixer = kind == "sparsemixer"
    _route[(triton.cdiv(num_tokens, rows),)](
        logits, experts, factors, num_tokens, logits.stride(0), 2.0 * jitter,
        NUM_EXPERTS=num_experts, WIDTH=width, TOP_K=top_k, ROWS=rows, IS_SPARSEMIXER=is_sparsemixer,
        IS_RENORMALISED=is_renormalised and not is_sparsemixer,
    )  # fmt: skip
    return experts, factors


@triton.jit
def _group(
    experts, who, starts, tile_starts, num_pairs,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, COUNTED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Program e of E + 1: counts all experts' pairs, then puts those of expert e in their places, in order."""
    expert = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    counts = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, num_pairs, COUNTED):
        pair = first + tl.arange(0, COUNTED)
        found = tl.load(experts + pair, mask=pair < num_pairs, other=-1)
        counts += tl.sum((found[:, None] == lane[None, :]).to(tl.int32), axis=0)
    is_before = lane < expert
    start = tl.sum(tl.where(is_before, counts, 0), axis=0)
    tl.store(starts + expert, start)
    tl.store(tile_starts + expert, tl.sum(tl.where(is_before, (counts + (TOKENS - 1)) // TOKENS, 0), axis=0))
    for first in range(0, num_pairs, PLACED):
        pair = first + tl.arange(0, PLACED)
        is_own = (tl.load(experts + pair, mask=pair < num_pairs, other=-1) == expert).to(tl.int32)
        tl.store(who + start + tl.cumsum(is_own, axis=0) - 1, pair, mask=is_own != 0)
        start += tl.sum(is_own, axis=0)


@dataclass(frozen=True, slots=True)
class Groups:
    """Which expert multiplies what: made once for the products of a layer, on the device, without waiting for it.

    who int32 [P]: the pairs (token, choice), by experts. starts int32 [E + 1]: where each expert's pairs begin.
    tile_starts int32 [E + 1]: where its tiles of `tokens` pairs do; num_tiles: as many as there can be.
    """

    who: Tensor
    starts: Tensor
    tile_starts: Tensor
    tokens: int
    num_tiles: int

    @staticmethod
    def of(experts: Tensor, num_experts: int) -> "Groups":
        """From experts [T, choices], int32 or int64: the experts of each token, each in [0, num_experts)."""
        num_pairs, device = experts.numel(), experts.device
        # Twice as wide as a group is on average: a second tile of an expert reads its matrix once more.
        tokens = LEAST_TILE_TOKENS
        while tokens < MOST_TILE_TOKENS and tokens * num_experts < 2 * num_pairs:
            tokens *= 2
        who = torch.empty(num_pairs, dtype=torch.int32, device=device)
        starts, tile_starts = torch.empty(2, num_experts + 1, dtype=torch.int32, device=device)
        groups = Groups(who, starts, tile_starts, tokens, min(num_pairs, num_experts) + num_pairs // tokens)
        require_device(experts)
        width = triton.next_power_of_2(num_experts)
        all_pairs = triton.next_power_of_2(max(16, num_pairs))
        _group[(num_experts + 1,)](
            experts.contiguous(), who, starts, tile_starts, num_pairs,
            TOKENS=tokens, WIDTH=width, COUNTED=min(max(16, MOST_COMPARED // width), all_pairs),
            PLACED=min(MOST_PLACED, all_pairs),
        )  # fmt: skip
        return groups
