"""What a draft samples its tokens from: its own distribution, cut down to so few candidates that they can be sent."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve_app.engine.speculation.draft_call import SamplingChain

CANDIDATES = 32
"""The likeliest tokens, of which one is sampled: the others' share is lost as acceptance, not as exactness."""


class DraftSampler:
    """Random numbers of its own: they must not hang together with those by which the target accepts."""

    def __init__(self, seed: int | None = None, num_ids: int | None = None) -> None:
        """seed None: a new one. num_ids: those beyond are no candidates."""
        self._random = np.random.Generator(np.random.Philox(seed))
        self._num_ids = num_ids

    def draw(
        self, top_ids: NDArray[np.int64], logprobs: NDArray[np.float32], chains: Sequence[SamplingChain]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """One token of each row: top_ids and logprobs [S, K], the likeliest first, at temperature 1 and with any scale
        → token ids [S], candidates and their chances [S, K], see SampledTokens. What is no number is no candidate."""
        if self._num_ids is not None and (is_beyond := top_ids >= self._num_ids).any():
            # To the end of the row.
            order = is_beyond.argsort(axis=1, kind="stable")
            top_ids = np.take_along_axis(np.where(is_beyond, 0, top_ids), order, 1)
            logprobs = np.take_along_axis(np.where(is_beyond, np.float32("-inf"), logprobs), order, 1)
        chances = chances_of(logprobs, chains)
        cumulated = chances.cumsum(axis=1, dtype=np.float64)
        target = self._random.random(len(chances)) * cumulated[:, -1]
        drawn = (cumulated <= target[:, None]).sum(axis=1)
        candidates = np.maximum(top_ids, 0).astype(np.int32)
        return candidates[np.arange(len(drawn)), drawn], candidates, chances


def chances_of(logprobs: NDArray[np.float32], chains: Sequence[SamplingChain]) -> NDArray[np.float32]:
    """logprobs [S, K], best first → probabilities [S, K] after temperature, top-k, top-p and min-p of each row."""
    rows = np.array([(chain.temperature, chain.top_k, chain.top_p, chain.min_p) for chain in chains])
    temperature, top_k, top_p, min_p = rows.T[..., None]
    with np.errstate(invalid="ignore"):
        weights = np.nan_to_num(np.exp((logprobs - logprobs[:, :1]).astype(np.float64) / temperature))
    # A row without a number: its first candidate, which is as good as any.
    weights[:, 0] = 1.0
    weights[(top_k > 0) & (np.arange(weights.shape[1]) >= top_k)] = 0.0
    weights /= weights.sum(axis=1, keepdims=True)
    before = weights.cumsum(axis=1) - weights
    is_kept = (before < np.where(top_p < 1, top_p, np.inf)) & (weights >= min_p * weights[:, :1])
    is_kept[:, 0] = True
    weights *= is_kept
    chances: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return chances
