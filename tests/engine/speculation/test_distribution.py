"""The joint law of the first three tokens, drawn through the verification of drafts, is that of the target.

The forward is a table: 50 tokens whose logits depend on the token before. Expected probabilities are computed here, in
float64, by the sampling chain's own definition: penalties, temperature, top-p. The draft is a coarser table; it
proposes its likeliest tokens, or samples them, or does the one for some requests of a batch and the other for the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.cpu import sampling
from serve_app.batch import DraftChances, Drafts
from serve_app.engine import logits_ops
from serve_app.engine.sampler import Sampler
from serve_app.engine.speculation import verify as verifying
from serve_app.engine.speculation.draft_call import SamplingChain
from serve_app.engine.speculation.draft_sampler import CANDIDATES, DraftSampler
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
Mode = Literal["one-hot", "sampled", "mixed"]
MODES: tuple[Mode, ...] = ("one-hot", "sampled")
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


class TableDraft:
    """Proposes by a coarser table. mode: whose tokens are sampled; mixed: those of every other request."""

    def __init__(self, logits: Table, params: SamplingParams, mode: Mode, seed: int) -> None:
        self._scores = np.round(logits / 2)
        self._best = np.argsort(-self._scores, axis=1, kind="stable")[:, :CANDIDATES]
        self._chain = SamplingChain(params.temperature, params.top_k, params.top_p, params.min_p)
        self._sampler = DraftSampler(seed)
        self._mode = mode

    def propose(self, last: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], Drafts]:
        """Texts, each the last token and what is proposed behind it, all in one; and the drafts."""
        is_sampled = np.full(len(last), self._mode != "one-hot")
        if self._mode == "mixed":
            is_sampled[1::2] = False
        ids = np.full((len(last), LENGTH), -1)
        ids[:, 0] = last
        candidates = np.zeros((len(last), LENGTH - 1, CANDIDATES), np.int64)
        chances = np.zeros(candidates.shape, np.float32)
        for place in range(LENGTH - 1):
            ids[:, place + 1] = self._best[ids[:, place], 0]
            if len(who := np.flatnonzero(is_sampled)):
                best = self._best[ids[who, place]]
                scores = np.take_along_axis(self._scores[ids[who, place]], best, axis=1)
                drawn = self._sampler.draw(best, scores, [self._chain] * len(who))
                ids[who, place + 1], candidates[who, place], chances[who, place] = drawn
        is_there = np.arange(LENGTH - 1) < counts[:, None]
        proposed = ids[:, 1:][is_there]
        drafts = Drafts(counts, proposed)
        if self._mode != "one-hot":
            places = np.flatnonzero(np.broadcast_to(is_sampled[:, None], is_there.shape)[is_there])
            drafts = Drafts(
                counts, proposed, DraftChances(places, candidates[is_there][places], chances[is_there][places])
            )
        return ids[np.arange(LENGTH) <= counts[:, None]], drafts


def draw(
    logits: Table, params: SamplingParams, seed: int, count: int, mode: Mode = "one-hot", form: str = "host"
) -> tuple[NDArray[np.int64], float]:
    """[count, 3], drawn where drafts were proposed; and the share of proposed tokens that was accepted. form: host,
    torch, or, all places in one call as on a GPU, at once."""
    draft = TableDraft(logits, params, mode, seed)
    num_proposed = num_accepted = 0
    seeds = np.random.default_rng(seed).integers(0, 2**63, count)
    sampler = Sampler(VOCABULARY, ROWS, is_native=form == "host")
    sampler._is_on_device = form == "at once"
    drawn = np.full((count, LENGTH), -1)
    for begin in range(0, count, ROWS):
        said = drawn[begin : begin + ROWS]
        known = np.zeros(len(said), np.int64)
        for row in range(len(said)):
            sampler.set_row(row, params, int(seeds[begin + row]), [BEGIN])
        while len(rows := np.flatnonzero(known < LENGTH)):
            last = np.where(known[rows] > 0, said[rows, known[rows] - 1], BEGIN)
            texts, drafts = draft.propose(last, LENGTH - 1 - known[rows])
            found = verify(sampler, logits[texts], rows, known[rows] + 1, drafts)
            ends = np.cumsum(found.counts)
            for row, number, end in zip(rows, found.counts, ends, strict=True):
                said[row, known[row] : known[row] + number] = found.sampled.token_ids[end - number : end]
            known[rows] += found.counts
            num_proposed += len(drafts.token_ids)
            num_accepted += int((found.counts - 1).sum())
    return drawn, num_accepted / num_proposed


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
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("manner", MANNERS)
def test_three_tokens_have_the_targets_law(manner: str, mode: Mode, seed: int) -> None:
    logits, params = table(), SamplingParams(**MANNERS[manner])
    drawn, _ = draw(logits, params, seed, 200_000, mode)
    # Bonferroni: one false alarm in a thousand runs of all seeds, modes and manners.
    assert p_value(drawn, law(logits, params)) > 1e-3 / (20 * len(MANNERS) * len(MODES))


@pytest.mark.parametrize("form", ["host", "torch", "at once"])
@pytest.mark.parametrize("manner", MANNERS)
def test_both_modes_in_one_batch(manner: str, form: str) -> None:
    logits, params = table(), SamplingParams(**MANNERS[manner])
    drawn, _ = draw(logits, params, 1, 20_000, "mixed", form)
    assert p_value(drawn, law(logits, params)) > 1e-3 / (3 * len(MANNERS))


@pytest.mark.parametrize("manner", MANNERS)
def test_of_sampled_drafts_more_is_accepted(manner: str) -> None:
    logits, params = table(), SamplingParams(**MANNERS[manner])
    (_, one_hot), (_, sampled) = (draw(logits, params, 0, 10_000, mode) for mode in ("one-hot", "sampled"))
    assert sampled > one_hot + 0.02


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
        drawn, _ = draw(logits, params, 0, 40_000)
    assert p_value(drawn, law(logits, params)) < 1e-6


def draw_from_p(*args: Any) -> NDArray[np.int64]:
    """A rule that accepts as it should, but draws a rejected token's successor from p, not from what q leaves of it."""
    logits, temperature, top_k, top_p, min_p, u, _, tokens, _, _ = args
    accepted = accept_or_draw(*args)
    return np.where(accepted == tokens, tokens, sampling.draw_tokens(logits, temperature, top_k, top_p, min_p, u))


def accept_more(*args: Any) -> NDArray[np.int64]:
    """A rule that takes each chance of the draft for a tenth less than it is."""
    return accept_or_draw(*args[:-1], 0.9 * args[-1])


accept_or_draw = sampling.accept_or_draw


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("rule", [draw_from_p, accept_more, None])
def test_a_rule_for_sampled_drafts_that_is_slightly_wrong_is_noticed(
    rule: Any, manner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rule is not None:
        monkeypatch.setattr(sampling, "accept_or_draw", rule)
    else:
        # One random number accepts a token, and draws the one in its place.
        monkeypatch.setattr(logits_ops, "_ACCEPTING", 0)
    logits, params = table(), SamplingParams(**MANNERS[manner])
    drawn, _ = draw(logits, params, 0, 60_000, "sampled")
    assert p_value(drawn, law(logits, params)) < 1e-6


@pytest.mark.parametrize("manner", MANNERS)
def test_the_law_sums_to_one(manner: str) -> None:
    assert law(table(), SamplingParams(**MANNERS[manner])).sum() == pytest.approx(1)
