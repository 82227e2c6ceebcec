"""The joint law of the first three tokens, drawn through the verification of drafts, is that of the target.

The forward is a table: 50 tokens whose logits depend on the token before. Expected probabilities are computed here, in
float64, by the sampling chain's own definition: penalties, temperature, top-p.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serve_app.batch import Drafts
from serve_app.engine.sampler import Sampler
from serve_app.engine.speculation import verify as verifying
from serve_app.engine.speculation.verify import verify
from serve_app.options import SamplingParams

VOCABULARY, BEGIN, LENGTH, ROWS = 50, 0, 3, 2000
MANNERS: dict[str, dict[str, Any]] = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.3": {"temperature": 1.3},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "penalties": {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": 0.5},
}
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 20))]
Table = NDArray[np.float32]


def table() -> Table:
    return np.random.default_rng(5).normal(0, 2.5, (VOCABULARY, VOCABULARY)).astype(np.float32)


def law(logits: Table, params: SamplingParams) -> NDArray[np.float64]:
    """[50, 50, 50]: probabilities of three tokens after BEGIN."""
    joint = np.zeros((VOCABULARY,) * LENGTH)

    def after(said: tuple[int, ...]) -> NDArray[np.float64]:
        scores = logits[said[-1] if said else BEGIN].astype(np.float64)
        for token in said:
            scores[token] -= params.frequency_penalty
        for token in set(said):
            scores[token] -= params.presence_penalty
        chances = np.exp((scores - scores.max()) / params.temperature)
        chances /= chances.sum()
        order = np.argsort(-chances)
        before = np.cumsum(chances[order]) - chances[order]
        chances[order[before >= params.top_p]] = 0
        found: NDArray[np.float64] = chances / chances.sum()
        return found

    first = after(())
    for a in np.flatnonzero(first):
        second = after((int(a),))
        for b in np.flatnonzero(second):
            joint[a, b] = first[a] * second[b] * after((int(a), int(b)))
    return joint


def draw(logits: Table, params: SamplingParams, seed: int, count: int) -> NDArray[np.int64]:
    """[count, 3]: drawn where a draft of the three tokens that are likeliest by a coarser table was proposed."""
    coarse = np.round(logits / 2).argmax(1)
    seeds = np.random.default_rng(seed).integers(0, 2**63, count)
    sampler = Sampler(VOCABULARY, ROWS)
    drawn = np.full((count, LENGTH), -1)
    for begin in range(0, count, ROWS):
        said = drawn[begin : begin + ROWS]
        known = np.zeros(len(said), np.int64)
        for row in range(len(said)):
            sampler.set_row(row, params, int(seeds[begin + row]), [BEGIN])
        while len(rows := np.flatnonzero(known < LENGTH)):
            last = np.where(known[rows] > 0, said[rows, known[rows] - 1], BEGIN)
            counts = LENGTH - 1 - known[rows]
            texts, proposed = [], []
            for token, number in zip(last, counts, strict=True):
                text = [token]
                for _ in range(number):
                    text.append(coarse[text[-1]])
                texts += text
                proposed += text[1:]
            drafts = Drafts(counts, np.array(proposed, np.int64))
            found = verify(sampler, logits[texts], rows, known[rows] + 1, drafts)
            ends = np.cumsum(found.counts)
            for row, number, end in zip(rows, found.counts, ends, strict=True):
                said[row, known[row] : known[row] + number] = found.sampled.token_ids[end - number : end]
            known[rows] += found.counts
    return drawn


def p_value(drawn: NDArray[np.int64], joint: NDArray[np.float64]) -> float:
    """Of Pearson's test; triples that are expected fewer than five times count as one."""
    seen = np.bincount(np.ravel_multi_index(tuple(drawn.T), joint.shape), minlength=joint.size)
    expected = joint.ravel() * len(drawn)
    is_frequent = expected >= 5
    observed = np.append(seen[is_frequent], seen[~is_frequent].sum())
    wanted = np.append(expected[is_frequent], expected[~is_frequent].sum())
    is_possible = wanted > 0
    assert not observed[~is_possible].any()
    squares = ((observed - wanted)[is_possible] ** 2 / wanted[is_possible]).sum()
    freedom = torch.tensor((is_possible.sum() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(squares / 2, dtype=torch.float64)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("manner", MANNERS)
def test_three_tokens_have_the_targets_law(manner: str, seed: int) -> None:
    logits, params = table(), SamplingParams(**MANNERS[manner])
    drawn = draw(logits, params, seed, 200_000)
    # Bonferroni: one false alarm in a thousand runs of all seeds and manners.
    assert p_value(drawn, law(logits, params)) > 1e-3 / (20 * len(MANNERS))


@contextmanager
def believing(share: float) -> Iterator[None]:
    """A rule that takes a proposed token now and then, whatever was drawn."""
    chance = np.random.default_rng(1)

    class Credulous(verifying._Drawing):
        def _draw(self, at: NDArray[np.int64], owner: NDArray[np.int64]) -> None:
            super()._draw(at, owner)
            taken = (self._proposed[at] >= 0) & (chance.random(len(at)) < share)
            self._drawn[at[taken]] = self._proposed[at[taken]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifying, "_Drawing", Credulous)
        yield


@pytest.mark.parametrize("manner", MANNERS)
def test_a_rule_that_is_slightly_wrong_is_noticed(manner: str) -> None:
    logits, params = table(), SamplingParams(**MANNERS[manner])
    with believing(0.15):
        drawn = draw(logits, params, 0, 40_000)
    assert p_value(drawn, law(logits, params)) < 1e-6


@pytest.mark.parametrize("manner", MANNERS)
def test_the_law_sums_to_one(manner: str) -> None:
    assert law(table(), SamplingParams(**MANNERS[manner])).sum() == pytest.approx(1)
