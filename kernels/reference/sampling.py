"""Random numbers and the draw from filtered distributions, in plain torch on any device, for all rows at once."""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four random words of each counter. All int64 tensors of one shape holding 32-bit words.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap around modulo 2**64, which leaves their bits as they should be.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32) & _LOW ^ c1 ^ k0, b & _LOW, (a >> 32) & _LOW ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """u(seed, position) in [0, 1), float64 [S]: the first word of Philox with the seed as key, the position as counter.

    seeds and positions [S] int64; seeds are 64-bit patterns.
    """
    zero = torch.zeros_like(positions)
    counter = (positions & _LOW, (positions >> 32) & _LOW, zero, zero)
    word = philox4x32_10(counter, (seeds & _LOW, (seeds >> 32) & _LOW))[0]
    return word.double() * 2.0**-32


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, by a copy that the host does not wait for: the memory it is from is pinned."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def draw_tokens(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    """One token of each row: softmax(logits / temperature), top-k, top-p, min-p, inverse of the cumulated rest at u.

    logits [S, V] float32 on any device; the others [S] on the CPU: temperature float32 (0 takes the likeliest), top_k
    int64 (0 = off), top_p float64 (1 and above = off), min_p float64 (0 = off), u float64 in [0, 1) with at most 32
    bits. Returns int64 [S] on the logits' device.

    A row without filters is cumulated in the order of token ids, one with filters from the likeliest token down,
    whatever its neighbours are: its token depends on the row alone.
    """
    ids = torch.empty(len(u), dtype=torch.int64, device=logits.device)
    is_random = temperature > 0
    is_filtered = is_random & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    greedy, plain, filtered = (w.nonzero().squeeze(1) for w in (~is_random, is_random & ~is_filtered, is_filtered))
    if len(greedy):
        at = without_waiting(greedy, ids.device)
        ids[at] = logits.index_select(0, at).argmax(dim=-1)
    if len(plain):
        at = without_waiting(plain, ids.device)
        weights = _softmax(logits.index_select(0, at), temperature[plain])
        ids[at] = draw(weights, without_waiting(u[plain], ids.device))
    if len(filtered):
        at = without_waiting(filtered, ids.device)
        weights = _softmax(logits.index_select(0, at), temperature[filtered])
        filters = [without_waiting(f[filtered], ids.device) for f in (top_k, top_p, min_p)]
        best, order = weights.sort(dim=-1, descending=True, stable=True)
        drawn = draw(filter_sorted(best, *filters), without_waiting(u[filtered], ids.device))
        ids[at] = order.gather(1, drawn.clamp_(max=logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    # Only NaNs lead beyond the last token.
    return ids.clamp_(max=logits.shape[1] - 1)


def probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """What draw_tokens draws from, float32 [S, V] by token id. Arguments as its; temperature above 0."""
    weights = _softmax(logits, temperature)
    filtered = ((top_k > 0) | (top_p < 1) | (min_p > 0)).nonzero().squeeze(1)
    if len(filtered):
        at = without_waiting(filtered, weights.device)
        filters = [without_waiting(f[filtered], weights.device) for f in (top_k, top_p, min_p)]
        best, order = weights.index_select(0, at).sort(dim=-1, descending=True, stable=True)
        kept = filter_sorted(best, *filters)
        kept /= kept.sum(dim=-1, keepdim=True)
        weights.index_copy_(0, at, torch.zeros_like(kept).scatter_(1, order, kept))
    return weights


LEAST_REST = 1e-6
"""What is left of a distribution after another one was taken from it is rounding alone, where it is less."""


def accept_or_draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    u: Tensor,
    accept_u: Tensor,
    tokens: Tensor,
    candidates: Tensor,
    chances: Tensor,
) -> Tensor:
    """Of tokens that were sampled from other distributions q, those that are accepted; for the others one drawn anew,
    so that together they are of the law that draw_tokens draws from, p.

    The first arguments are draw_tokens', with temperatures above 0; accept_u [S] as u, and independent of it; tokens
    [S] int64, candidates [S, K] int64 and chances [S, K] float32 on the logits' device: each row's q, which is 0 for
    all other ids. A token x is accepted with the probability min(1, p(x) / q(x)), else the new one is of the law
    max(0, p - q), normalised. Returns int64 [S] on the logits' device: what is drawn anew is another token.

    Source: Leviathan et al., "Fast inference from transformers via speculative decoding", ICML 2023, algorithm 1.
    """
    p = probabilities(logits, temperature, top_k, top_p, min_p)
    q_of = torch.where(candidates == tokens.unsqueeze(1), chances, 0).sum(dim=-1)
    p_of = p.gather(1, tokens.unsqueeze(1)).squeeze(1)
    is_accepted = (q_of > 0) & (without_waiting(accept_u, p.device) * q_of < p_of)
    rest = p.scatter_add(1, candidates, -chances).clamp_(min=0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > LEAST_REST, rest, p)
    drawn = draw(rest, without_waiting(u, p.device)).clamp_(max=logits.shape[1] - 1)
    return torch.where(is_accepted, tokens, drawn)


def _softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    # The largest goes to 0 before the division: a tiny temperature must not overflow.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return (shifted / without_waiting(temperature, logits.device).unsqueeze(1)).softmax(dim=-1)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """The index drawn from each row by inverting its cumulated weights at u.

    weights [S, C], not negative, any sum above 0; u [S] float64 in [0, 1) with at most 32 bits, so that u * sum stays
    below the sum. An index of weight 0 is never drawn. Returns int64 [S].
    """
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    target = u.unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).squeeze(1)


def filter_sorted(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zeroes what top-k, then top-p, then min-p take away; the first entry of a row always stays.

    probabilities [S, C] in descending order, shares of the whole vocabulary's sum (which may exceed theirs); top_k [S]
    int64 (0 = off), top_p and min_p [S]. top-p counts within what top-k left and keeps the entry that crosses p;
    min-p drops what lies below min_p times the largest.
    """
    rank = torch.arange(probabilities.shape[1], device=probabilities.device)
    is_limited = (top_k > 0).unsqueeze(1)
    kept = torch.where(is_limited & (rank >= top_k.unsqueeze(1)), 0.0, probabilities)
    # Cumulated one by one, so that what is cut off beyond the last column cannot change the sums before it.
    cumulated = kept.cumsum(dim=-1, dtype=torch.float64)
    whole = torch.where(is_limited, cumulated[:, -1:], 1.0)
    top_p = torch.where(top_p < 1, top_p, torch.inf)  # rounding must not cut the tail
    is_kept = (cumulated - kept < top_p.unsqueeze(1) * whole) & (kept >= min_p.unsqueeze(1) * kept[:, :1])
    is_kept[:, 0] = True
    return torch.where(is_kept, kept, 0.0)
