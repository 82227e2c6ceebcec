"""Which experts a token of a mixture takes, in plain torch: the oracle of csrc/experts.cpp, on any device."""

import torch
from torch import Tensor


def route(
    logits: Tensor, kind: str, top_k: int, is_renormalised: bool = False, jitter: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Router logits float32 [T, E] → experts [T, top_k] int64, ascending, and their factors [T, top_k] float32.

    kind softmax: the top_k largest probabilities over all experts, divided by their sum if is_renormalised.
    kind sparsemixer: top_k 2; the largest logit with its probability among those that lie within 2 * jitter of it,
    relative to the larger of it and their size; then the same without it. Of equal logits the first expert's is larger.
    """
    if kind == "sparsemixer":
        experts, factors = _sparsemixer(logits, jitter)
    else:
        experts = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        factors = torch.softmax(logits, dim=-1).gather(-1, experts)
        if is_renormalised:
            factors = factors / factors.sum(dim=-1, keepdim=True)
    experts, order = experts.sort(dim=-1)
    return experts, factors.gather(-1, order)


def _sparsemixer(logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    experts, factors, left = [], [], logits
    for _ in range(2):
        largest, first = left.max(dim=-1, keepdim=True)
        is_far = (largest - logits) / logits.abs().maximum(largest) > 2 * jitter
        factors.append(torch.softmax(left.masked_fill(is_far, -torch.inf), dim=-1).gather(-1, first))
        experts.append(first)
        left = left.scatter(-1, first, -torch.inf)
    return torch.cat(experts, dim=-1), torch.cat(factors, dim=-1)
