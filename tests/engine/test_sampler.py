"""The sampler against slow, obvious code, one row at a time."""

import math
import random
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch_operators import Operators

from kernels.reference.sampling import uniform
from serve_app.engine.dry import DryHistory
from serve_app.engine.sampler import Sampled, Sampler
from serve_app.options import DryParams, SamplingParams

VOCAB = 61
GREEDY = SamplingParams(temperature=0.0)


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.fixture(params=["host", "torch"], autouse=True)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits as native steps leave them, and as plain torch does."""
    monkeypatch.setattr(sys.modules[__name__], "FORM", request.param)


FORM = "torch"


def sample(sampler: Sampler, logits: torch.Tensor, rows: list[int], position: int = 10) -> Sampled:
    copy = logits.clone(memory_format=torch.contiguous_format)
    if FORM == "host":
        return sampler.sample(copy.numpy(), np.array(rows), np.full(len(rows), position)).wait()
    return sampler.sample(copy, np.array(rows), np.full(len(rows), position)).wait()


def new_sampler(vocab_size: int, rows: int, **kwargs: Any) -> Sampler:
    return Sampler(vocab_size, rows, is_native=FORM == "host", **kwargs)


def one_row(params: SamplingParams, logits: torch.Tensor, **kwargs: Any) -> int:
    sampler = new_sampler(logits.shape[-1], 1)
    sampler.set_row(0, params, 1, kwargs.pop("prompt", [0]), kwargs.pop("output", []))
    return int(sample(sampler, logits.view(1, -1), [0], **kwargs).token_ids[0])


def test_a_greedy_batch_costs_one_argmax() -> None:
    sampler = new_sampler(VOCAB, 8)
    for row in range(8):
        sampler.set_row(row, GREEDY, row, [1, 2])
    logits = random_logits(8)
    with Operators() as ops:
        result = sampler.sample(logits, np.arange(8), np.full(8, 5))
    # The detach is numpy()'s and computes nothing.
    torch_operators = [] if FORM == "host" else ["aten.argmax.default"]
    assert [name for name in ops.names if "detach" not in name] == torch_operators
    assert result.wait().token_ids.tolist() == logits.argmax(-1).tolist()


EVERYTHING = SamplingParams(
    temperature=0.7,
    top_k=20,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    dry=DryParams(multiplier=0.8, sequence_breakers=()),
    logit_bias=((3, 1.5), (9, -100.0)),
    min_tokens=100,
    logprobs=3,
)
MIXED = [
    GREEDY,
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(top_p=0.8),
    SamplingParams(top_k=5),
    SamplingParams(min_p=0.1),
    replace(GREEDY, repetition_penalty=1.3),
    replace(GREEDY, logit_bias=((4, 5.0),)),
    EVERYTHING,
]


def mixed_sampler(rows: int) -> Sampler:
    sampler = new_sampler(VOCAB, rows, eos_ids=[2])
    for row in range(rows):
        sampler.set_row(row, MIXED[row % len(MIXED)], row, [5, 6, 7, 5, 6], [7, 5])
    return sampler


def test_the_number_of_operators_does_not_grow_with_the_batch() -> None:
    counts = []
    for rows in (9, 90):
        sampler, logits = mixed_sampler(rows), random_logits(rows)
        with Operators() as ops:
            sampler.sample(logits, np.arange(rows), np.full(rows, 9))
        counts.append(len(ops.names))
    assert counts[1] <= counts[0]


def test_a_row_draws_the_same_whatever_else_is_in_the_batch() -> None:
    rows, steps = 18, 12
    logits = [random_logits(rows, seed=s) for s in range(steps)]
    together = mixed_sampler(rows)
    batch = [sample(together, logits[s], list(range(rows)), 7 + s).token_ids for s in range(steps)]
    alone, chooser = mixed_sampler(rows), random.Random(1)
    for s in range(steps):
        order = chooser.sample(range(rows), rows)
        cut = chooser.randint(1, rows - 1)
        for some in (order[:cut], order[cut:]):
            got = sample(alone, logits[s][some], some, 7 + s).token_ids
            assert got.tolist() == batch[s][some].tolist()


def test_a_preempted_row_goes_on_as_if_nothing_had_happened() -> None:
    params = replace(EVERYTHING, logprobs=None)
    kept, again = new_sampler(VOCAB, 1), new_sampler(VOCAB, 1)
    prompt, output = [5, 6, 7, 5, 6, 7], []
    kept.set_row(0, params, 42, prompt)
    for step in range(30):
        again.set_row(0, params, 42, prompt, output)
        logits = random_logits(1, seed=step % 3)
        first = sample(kept, logits, [0], 6 + step).token_ids
        assert sample(again, logits, [0], 6 + step).token_ids.tolist() == first.tolist()
        output += first.tolist()


def filtered(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """Probabilities after temperature and filters, by the definition."""
    scaled = (logits.double() / params.temperature).softmax(-1).tolist()
    kept = sorted(enumerate(scaled), key=lambda pair: (-pair[1], pair[0]))
    if params.top_k > 0:
        kept = kept[: params.top_k]
    total, passed, crossing = sum(p for _, p in kept), 0.0, []
    for pair in kept:
        if passed < params.top_p * total or not crossing:
            crossing.append(pair)
        passed += pair[1]
    kept = [pair for pair in crossing if pair[1] >= params.min_p * crossing[0][1]]
    total = sum(p for _, p in kept)
    return {i: p / total for i, p in kept}


@pytest.mark.parametrize("vocab", [VOCAB, 5000])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.5, top_k=7),
        SamplingParams(top_p=0.6),
        SamplingParams(top_p=0.9999, temperature=2.0),
        SamplingParams(min_p=0.05),
        SamplingParams(min_p=1e-9, temperature=3.0),
        SamplingParams(top_k=30, top_p=0.8, min_p=0.02, temperature=1.3),
    ],
)
def test_draws_follow_the_filtered_distribution(params: SamplingParams, vocab: int) -> None:
    draws, logits = 3000, random_logits(1, vocab)
    sampler = new_sampler(vocab, draws)
    for row in range(draws):
        sampler.set_row(row, params, row, [0])
    counts = Counter(sample(sampler, logits.expand(draws, -1), list(range(draws))).token_ids.tolist())
    expected = filtered(logits[0], params)
    assert set(counts) <= set(expected)
    # Chi-squared over the cells that expect at least 5, the rest as one; 5 standard deviations of its distribution.
    cells = [i for i, p in expected.items() if p * draws >= 5]
    rest = 1 - sum(expected[i] for i in cells)
    terms = [(counts[i] - draws * expected[i]) ** 2 / (draws * expected[i]) for i in cells]
    if rest * draws >= 1:
        outside = draws - sum(counts[i] for i in cells)
        terms.append((outside - draws * rest) ** 2 / (draws * rest))
    freedom = max(1, len(terms) - 1)
    assert sum(terms) < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_the_random_number_is_that_of_seed_and_position() -> None:
    logits = random_logits(1)
    probabilities = logits[0].softmax(-1).double().cumsum(0)
    for seed, position in [(0, 3), (-5, 9), (2**70 + 3, 2)]:
        sampler = new_sampler(VOCAB, 1)
        sampler.set_row(0, SamplingParams(), seed, [0])
        wrapped = seed % 2**64
        pattern = torch.tensor([wrapped - 2**64 if wrapped >= 2**63 else wrapped])
        u = uniform(pattern, torch.tensor([position])) * probabilities[-1]
        assert sample(sampler, logits, [0], position).token_ids[0] == int((probabilities <= u).sum())


def test_extremes() -> None:
    ties = torch.zeros(VOCAB)
    assert one_row(SamplingParams(top_k=1), ties) == 0
    assert one_row(SamplingParams(top_p=0.0), ties) == 0
    assert one_row(SamplingParams(top_k=10**9), ties) < VOCAB
    steep = torch.arange(VOCAB).float() * 1e6
    assert one_row(SamplingParams(temperature=1e-6), steep) == VOCAB - 1
    assert one_row(SamplingParams(temperature=1e-8), random_logits(1)) == int(random_logits(1).argmax())
    only = torch.full((VOCAB,), float("-inf"))
    only[17] = 0.0
    for params in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(min_p=0.1), GREEDY):
        assert one_row(params, only) == 17
    assert 0 <= one_row(SamplingParams(), torch.full((VOCAB,), float("nan"))) < VOCAB


def test_penalties_are_those_of_the_definition() -> None:
    params = replace(GREEDY, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3)
    prompt, output = [1, 2, 3, 3], [3, 4, 4, 5]
    for seed in range(50):
        logits = random_logits(1, seed=seed)[0]
        expected = logits.clone()
        for i in range(VOCAB):
            count = output.count(i)
            expected[i] -= 0.4 * count + 0.7 * (count > 0)
            if i in prompt + output:
                expected[i] = expected[i] / 1.3 if expected[i] > 0 else expected[i] * 1.3
        assert one_row(params, logits, prompt=prompt, output=output) == int(expected.argmax())


def test_drawn_tokens_count_at_once() -> None:
    sampler = new_sampler(4, 1)
    sampler.set_row(0, replace(GREEDY, frequency_penalty=1.0), 0, [0])
    logits = torch.tensor([[2.0, 1.4, 0.7, -9.0]])
    assert [int(sample(sampler, logits, [0]).token_ids[0]) for _ in range(6)] == [0, 1, 0, 2, 1, 0]


def test_logit_bias_and_min_tokens() -> None:
    logits = torch.zeros(VOCAB)
    assert one_row(replace(GREEDY, logit_bias=((9, 2.0), (8, 1.0))), logits) == 9
    logits[2] = 10.0
    sampler = new_sampler(VOCAB, 1, eos_ids=[2])
    sampler.set_row(0, replace(GREEDY, min_tokens=2, stop_token_ids=(0, 1)), 0, [5, 5, 5])
    assert [int(sample(sampler, logits.view(1, -1), [0], p).token_ids[0]) for p in (3, 4, 5)] == [3, 3, 2]


def test_logprobs_are_of_the_raw_distribution() -> None:
    sampler = new_sampler(VOCAB, 3)
    sampler.set_row(0, replace(EVERYTHING, logprobs=4), 7, [1], [2])
    sampler.set_row(1, GREEDY, 7, [1])
    sampler.set_row(2, replace(GREEDY, logprobs=0), 7, [1])
    logits = random_logits(3)
    result = sample(sampler, logits, [0, 1, 2])
    expected = logits.log_softmax(-1)
    assert result.logprobs is not None
    chosen, top_ids, top = result.logprobs.chosen, result.logprobs.top_ids, result.logprobs.top_logprobs
    assert top_ids.shape == (3, 4)
    for row in (0, 2):
        assert chosen[row] == pytest.approx(float(expected[row, result.token_ids[row]]), abs=1e-5)
    assert top_ids[0].tolist() == expected[0].topk(4).indices.tolist()
    np.testing.assert_allclose(top[0], expected[0].topk(4).values, atol=1e-5)
    assert np.isnan(chosen[1])
    assert (top_ids[1] == -1).all()


class Countdown:
    """Allows only `next`, which rises by one with each token."""

    def __init__(self, start: int) -> None:
        self.next = start

    def advance(self, token_id: int) -> None:
        assert token_id == self.next
        self.next += 1

    def rollback(self, num_tokens: int) -> None:
        self.next -= num_tokens

    def fill(self, row: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        row[:] = 0
        row.view(np.uint32)[self.next // 32] = 1 << (self.next % 32)

    def fork(self) -> "Countdown":
        return Countdown(self.next)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.5)])
def test_masks_are_filled_obeyed_and_advanced(params: SamplingParams) -> None:
    sampler = new_sampler(VOCAB, 3)
    sampler.set_row(0, params, 0, [1], mask=Countdown(30))
    sampler.set_row(1, GREEDY, 0, [1])
    sampler.fork_row(0, 2, 5)
    for step in range(3):
        logits = random_logits(3, seed=step)
        got = sample(sampler, logits, [0, 1, 2]).token_ids.tolist()
        assert got == [30 + step, int(logits[1].argmax()), 30 + step]
    sampler.clear_row(0)
    sampler.set_row(0, GREEDY, 0, [1])
    assert sample(sampler, random_logits(1), [0]).token_ids[0] == random_logits(1).argmax()


class Late:
    """See Fetch: results that have not come yet."""

    def __init__(self, results: list[torch.Tensor]) -> None:
        self._results, self.waits = results, 0

    def wait(self) -> list[np.ndarray[Any, Any]]:
        self.waits += 1
        return [result.numpy() for result in self._results]


def test_masks_hear_of_a_token_when_the_next_one_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, fetches = Sampler(VOCAB, 2, is_native=False), []

    def fetch(results: list[torch.Tensor]) -> Late:
        fetches.append(Late(results))
        return fetches[-1]

    monkeypatch.setattr(sampler._ops, "fetch", fetch)
    sampler.set_row(0, GREEDY, 0, [1], mask=Countdown(30))
    sampler.set_row(1, SamplingParams(), 0, [1])
    draws = [sampler.sample(random_logits(2, seed=s), np.arange(2), np.full(2, s)) for s in range(3)]
    assert [fetch.waits for fetch in fetches] == [1, 1, 0]
    assert [int(draw.wait().token_ids[0]) for draw in draws] == [30, 31, 32]
    # One that is gone is not told.
    sampler.clear_row(0)
    sampler.set_row(0, GREEDY, 0, [1], mask=Countdown(50))
    assert int(sampler.sample(random_logits(2), np.arange(2), np.full(2, 3)).wait().token_ids[0]) == 50


def test_a_fork_has_its_leaders_state_and_its_own_seed() -> None:
    params = replace(EVERYTHING, logprobs=None)
    sampler, other = new_sampler(VOCAB, 2), new_sampler(VOCAB, 2)
    sampler.set_row(0, params, 1, [5, 6, 7, 5, 6, 7])
    for step in range(5):
        output = [int(sample(sampler, random_logits(1, seed=step), [0], 6 + step).token_ids[0]) for _ in range(1)]
        other.set_row(1, params, 2, [5, 6, 7, 5, 6, 7], output)
    history = sampler._dry._tokens[0, 6 : sampler._dry._lengths[0]].tolist()
    other.set_row(1, params, 2, [5, 6, 7, 5, 6, 7], history)
    sampler.fork_row(0, 1, 2)
    for step in range(20):
        logits = random_logits(1, seed=100 + step)
        got = sample(sampler, logits, [1], 20 + step).token_ids.tolist()
        assert got == sample(other, logits, [1], 20 + step).token_ids.tolist()


def dry_oracle(params: DryParams, tokens: list[int], breakers: set[int]) -> dict[int, float]:
    """The definition, token by token."""
    longest: dict[int, int] = {}
    if not tokens or tokens[-1] in breakers:
        return {}
    for i in range(len(tokens) - 1):
        if tokens[i] != tokens[-1] or tokens[i + 1] in breakers:
            continue
        length = 1
        while length < 50 and length <= i:
            previous = tokens[len(tokens) - 1 - length]
            if tokens[i - length] != previous or previous in breakers:
                break
            length += 1
        longest[tokens[i + 1]] = max(length, longest.get(tokens[i + 1], 0))
    return {
        token: params.multiplier * params.base ** (length - params.allowed_length)
        for token, length in longest.items()
        if length >= params.allowed_length
    }


def dry_found(sampler: Sampler, rows: int) -> list[dict[int, float]]:
    found: list[dict[int, float]] = [{} for _ in range(rows)]
    if isinstance(sampler._dry, DryHistory):
        pairs = zip(*sampler._dry.penalties(np.arange(rows)), strict=True)
    else:
        dense = sampler._dry._amounts(np.arange(rows), int(sampler._dry._lengths.max()))
        pairs = ((row, token, dense[row, token]) for row, token in dense.nonzero().tolist())
    for row, token, amount in pairs:
        found[row][int(token)] = float(amount)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_dry_is_that_of_the_definition(seed: int) -> None:
    r = random.Random(seed)
    breakers = {0, 1}
    params = DryParams(multiplier=0.9, base=1.4, allowed_length=r.choice([1, 2, 3]), sequence_breakers=("x", "y"))
    sampler = new_sampler(8, 4, breaker_ids=lambda text: {"x": [0], "y": [1]}[text])
    texts = [[r.choice([0, 1, 2, 3, 3, 4, 4]) for _ in range(r.choice([1, 2, 40, 300]))] for _ in range(4)]
    texts[0] = [4, 5, 6] * 60
    for row, text in enumerate(texts):
        half = r.randint(0, len(text))
        sampler.set_row(row, replace(GREEDY, dry=params), 0, text[:half], text[half:])
    for step in range(6):
        found = dry_found(sampler, len(texts))
        for text, got in zip(texts, found, strict=True):
            assert got == pytest.approx(dry_oracle(params, text, breakers))
        logits = random_logits(4, 8, seed=step) / 3
        ids = sample(sampler, logits, [0, 1, 2, 3]).token_ids
        for row, text in enumerate(texts):
            expected = logits[row].clone()
            for token, amount in found[row].items():
                expected[token] -= amount
            assert ids[row] == int(expected.argmax())
            text.append(int(ids[row]))


def test_a_cleared_row_asks_for_nothing() -> None:
    sampler = new_sampler(VOCAB, 1)
    sampler.set_row(0, EVERYTHING, 0, [1])
    sampler.clear_row(0)
    result = sample(sampler, random_logits(1), [0])
    assert result.logprobs is None
    assert result.token_ids[0] == random_logits(1).argmax()
