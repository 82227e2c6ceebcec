"""From logits to drawn tokens: temperature, filters, inverse of the cumulated distribution."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.reference.sampling import draw, filter_sorted

SORT_WHOLE = 1024
"""Vocabularies up to this size are sorted whole."""
FIRST_CANDIDATES = 256
"""How many of the best tokens top-p and min-p look at before they sort the whole vocabulary."""


def draw_unfiltered(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """Draws from softmax(logits / temperature), cumulated in the order of token ids.

    logits [s, vocab] float32, temperature [s, 1], u [s] float64 → ids [s] int64.
    """
    return draw(_softmax(logits, temperature), u)


def draw_filtered(
    logits: Tensor,
    temperature: Tensor,
    u: Tensor,
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    min_p: NDArray[np.float64],
) -> Tensor:
    """Draws from what top-k, top-p and min-p leave, cumulated from the likeliest token down.

    A row's token depends on the row alone, not on how many candidates its neighbours make it look at.
    top_k, top_p, min_p [s] on the host; the rest as in draw_unfiltered.
    """
    probabilities = _softmax(logits, temperature)
    vocab_size = logits.shape[1]
    num_candidates = _num_candidates(vocab_size, top_k)
    best, ids = _best(probabilities, num_candidates)
    if num_candidates < vocab_size and not _covers(best, top_k, top_p, min_p):
        best, ids = _best(probabilities, vocab_size)
    device = logits.device
    kept = filter_sorted(
        best,
        torch.from_numpy(top_k).to(device),
        torch.from_numpy(top_p).to(device),
        torch.from_numpy(min_p.astype(np.float32)).to(device),
    )
    return ids.gather(1, draw(kept, u).unsqueeze(1)).squeeze(1)


def _softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    # The largest goes to 0 before the division: a tiny temperature must not overflow.
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)


def _num_candidates(vocab_size: int, top_k: NDArray[np.int64]) -> int:
    """A power of two above every row's top_k, so that ties at the edge of top-k are in sight."""
    if vocab_size <= SORT_WHOLE:
        return vocab_size
    wanted = int(np.where(top_k > 0, top_k, FIRST_CANDIDATES - 1).max())
    return min(vocab_size, 1 << wanted.bit_length())


def _best(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row and their ids, descending, equal ones by ascending id."""
    if count == probabilities.shape[1]:
        return probabilities.sort(dim=-1, descending=True, stable=True)
    ids = probabilities.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    best, order = probabilities.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(1, order)


def _covers(best: Tensor, top_k: NDArray[np.int64], top_p: NDArray[np.float64], min_p: NDArray[np.float64]) -> bool:
    """Whether every row's filters cut within the candidates."""
    mass = best.sum(dim=-1, dtype=torch.float64).cpu().numpy()
    ends = best[:, [0, -1]].double().cpu().numpy()
    is_cut = (top_k > 0) | (mass >= top_p) | (ends[:, 1] < min_p * ends[:, 0])
    return bool(is_cut.all())
