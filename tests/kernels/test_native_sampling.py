"""Native sampling against plain torch and numpy, in every instruction set."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.cpu import _native, sampling
from kernels.reference import sampling as plain

pytestmark = pytest.mark.usefixtures("each_isa")
each = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def random_logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


def reference(logits: NDArray[np.float32], *arguments: NDArray[np.generic]) -> NDArray[np.int64]:
    drawn = plain.draw_tokens(torch.from_numpy(logits), *(torch.from_numpy(a) for a in arguments))
    return drawn.numpy()


def test_uniform() -> None:
    seeds = np.array([0, 1, 2**64 - 1, 2**62 + 12345], np.uint64)
    positions = np.array([0, 7, 2**40, 100])
    expected = plain.uniform(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions))
    assert (sampling.uniform(seeds, positions) == expected.numpy()).all()


@pytest.mark.parametrize("vocab", [1, 7, 16, 100, 5000, 5003])
def test_likeliest(vocab: int) -> None:
    logits = random_logits(40, vocab)
    logits[:20] = np.round(logits[:20])  # ties
    assert (sampling.likeliest(logits) == logits.argmax(axis=1)).all()
    strided = random_logits(3, vocab + 5)[:, 2 : 2 + vocab]
    assert (sampling.likeliest(strided) == strided.argmax(axis=1)).all()
    assert sampling.likeliest(logits[:0]).shape == (0,)


def test_likeliest_of_broken_logits() -> None:
    nan, inf = math.nan, math.inf
    logits = np.array([[nan] * 3, [-inf] * 3, [nan, -inf, -inf], [nan, 1.0, 2.0], [0.0, inf, inf]], np.float32)
    assert sampling.likeliest(logits).tolist() == [0, 0, 1, 2, 1]


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("vocab", [1, 7, 500, 5000, 20000])
def test_draw(vocab: int, spread: float) -> None:
    rows = 120
    r = random.Random(vocab)
    logits = random_logits(rows, vocab, vocab, spread)
    logits[::7] = torch.from_numpy(logits[::7]).bfloat16().float().numpy()  # ties
    temperature = np.array([r.choice([0.0, 0.3, 1.0, 2.5]) for _ in range(rows)], np.float32)
    top_k = np.array([r.choice([0, 0, 1, 2, 40, vocab // 2, vocab, vocab + 9]) for _ in range(rows)])
    top_p = np.array([r.choice([1.0, 1.0, 0.0, 0.5, 0.9, 0.999]) for _ in range(rows)])
    min_p = np.array([r.choice([0.0, 0.0, 0.01, 0.3, 1.0]) for _ in range(rows)])
    u = sampling.uniform(np.arange(rows).astype(np.uint64), np.arange(rows))
    got = sampling.draw_tokens(logits, temperature, top_k, top_p, min_p, u)
    expected = reference(logits, temperature, top_k, top_p, min_p, u)
    # The two round differently: where u falls on the border between two tokens, they may take either, as it often does
    # between equal weights, whose shares the reference rounds all the same way.
    if spread == 0:
        assert (np.abs(got - expected) <= 1).all()
    else:
        assert (got != expected).sum() <= 1
    for row in (0, 5, 63):
        at = slice(row, row + 1)
        alone = sampling.draw_tokens(logits[at], temperature[at], top_k[at], top_p[at], min_p[at], u[at])
        assert alone[0] == got[row]


@each
@given(
    vocab=st.integers(1, 3000),
    top_k=st.integers(0, 60),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    spread=st.sampled_from([0.5, 4.0]),
)
def test_what_is_drawn_is_what_the_filters_keep(
    vocab: int, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    """Over evenly spread u the tokens come as often as the filtered distribution says."""
    draws = 200
    logits = random_logits(1, vocab, vocab, spread)
    weights = np.exp(logits[0].astype(np.float64) - logits.max())
    order = np.argsort(-weights, kind="stable")
    best = torch.from_numpy(weights[order] / weights.sum()).unsqueeze(0)
    kept = plain.filter_sorted(best, *(torch.tensor([f]) for f in (top_k, top_p, min_p)))[0].numpy()
    if top_k or top_p < 1 or min_p > 0:
        edges = np.cumsum(kept) / kept.sum()
        ids = order
    else:
        edges = np.cumsum(weights) / weights.sum()
        ids = np.arange(vocab)
    u = (np.arange(draws) + 0.5) / draws
    expected = ids[np.searchsorted(edges, u, side="right").clip(max=vocab - 1)]
    same = np.broadcast_to(logits, (draws, vocab))
    got = sampling.draw_tokens(
        np.ascontiguousarray(same), np.ones(draws, np.float32), np.full(draws, top_k), np.full(draws, top_p),
        np.full(draws, min_p), u,
    )  # fmt: skip
    # A border of float32 weights may lie on the other side of a filter's limit, or of some u.
    nearest = np.abs(edges[:, None] - u).min(axis=0) < 1e-5
    near = (
        np.abs(np.cumsum(best[0].numpy()) - top_p).min() < 1e-5
        or np.abs(best[0].numpy() / best[0, 0].item() - min_p).min() < 1e-5
    )
    assert near or (got == expected)[~nearest].all()


def test_draw_of_broken_logits_stays_in_the_vocabulary() -> None:
    nan, inf = math.nan, math.inf
    logits = np.array([[nan, nan], [-inf, -inf], [inf, 0.0], [-inf, 1.0], [nan, 1.0]], np.float32)
    one = np.ones(5)
    for top_k in (0, 1, 2):
        for top_p in (1.0, 0.5):
            ids = sampling.draw_tokens(
                logits, one.astype(np.float32), np.full(5, top_k), one * top_p, one * 0.0, one * 0.9
            )
            assert ((ids >= 0) & (ids < 2)).all()
            assert ids[3] == ids[4] == 1


def proposals(rows: int, vocab: int, width: int, seed: int) -> tuple[NDArray[np.generic], ...]:
    """Tokens, candidates and chances of each row; the last two candidates repeat others, with the chance 0."""
    chance = np.random.default_rng(seed)
    candidates = np.stack([chance.permutation(vocab)[:width] for _ in range(rows)])
    chances = chance.dirichlet(np.full(width, 0.5), rows).astype(np.float32)
    tokens = candidates[np.arange(rows), chance.integers(0, width, rows)]
    again = np.concatenate([candidates, candidates[:, :2]], 1)
    return tokens, again, np.concatenate([chances, np.zeros((rows, 2), np.float32)], 1)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("vocab", [2, 7, 500, 5000, 20000])
def test_what_is_accepted_and_drawn_instead(vocab: int, spread: float) -> None:
    rows = 120
    r = random.Random(vocab)
    logits = random_logits(rows, vocab, vocab, spread)
    logits[::5, : vocab // 2] = -math.inf
    temperature = np.array([r.choice([0.3, 1.0, 2.5]) for _ in range(rows)], np.float32)
    top_k = np.array([r.choice([0, 0, 1, 2, 40, vocab // 2, vocab, vocab + 9]) for _ in range(rows)])
    top_p = np.array([r.choice([1.0, 1.0, 0.0, 0.5, 0.9, 0.999]) for _ in range(rows)])
    min_p = np.array([r.choice([0.0, 0.0, 0.01, 0.3, 1.0]) for _ in range(rows)])
    u, accept_u = (sampling.uniform(np.arange(rows).astype(np.uint64), np.arange(rows) + n) for n in (0, 1000))
    arguments = [temperature, top_k, top_p, min_p, u, accept_u, *proposals(rows, vocab, min(vocab, 9), vocab)]
    before = logits.copy()
    got = sampling.accept_or_draw(logits, *arguments)
    assert (logits == before).all()
    expected = plain.accept_or_draw(torch.from_numpy(logits), *(torch.from_numpy(a) for a in arguments)).numpy()
    # See test_draw.
    assert (got != expected).sum() <= 1
    for row in (0, 5, 63):
        at = slice(row, row + 1)
        assert sampling.accept_or_draw(logits[at], *(a[at] for a in arguments))[0] == got[row]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_what_has_the_law_already_is_all_accepted_and_what_is_impossible_never(top_p: float) -> None:
    rows = 500
    logits = np.repeat(random_logits(1, 60), rows, axis=0)
    one, off = np.ones(rows), np.zeros(rows)
    parameters = one.astype(np.float32), off.astype(np.int64), top_p * one, off
    u, accept_u = (sampling.uniform(np.arange(rows).astype(np.uint64), np.full(rows, n)) for n in (1, 2))
    [p] = plain.probabilities(torch.from_numpy(logits[:1]), *(torch.from_numpy(a[:1]) for a in parameters)).numpy()
    candidates = np.tile(np.arange(60), (rows, 1))
    tokens = np.random.default_rng(1).choice(60, rows, p=p / p.sum(dtype=np.float64))
    for form in (sampling.accept_or_draw, in_torch):
        same = form(logits, *parameters, u, accept_u, tokens, candidates, np.tile(p, (rows, 1)))
        assert (same == tokens).mean() > 0.998
        # A token that was sampled for sure, and has no chance in p: what is drawn is as without it.
        impossible, sure = np.full(rows, 3), np.zeros((rows, 60), np.float32)
        sure[:, 3] = 1
        masked = logits.copy()
        masked[:, 3] = -math.inf
        drawn = form(masked, *parameters, u, accept_u, impossible, candidates, sure)
        if top_p == 1:
            assert (drawn == sampling.draw_tokens(masked, *parameters, u)).mean() > 0.998
        assert not (drawn == 3).any()
        # One that its own candidates do not name is rejected.
        assert not (form(masked, *parameters, u, accept_u, impossible, candidates[:, 4:], sure[:, 4:]) == 3).any()


def in_torch(*arguments: NDArray[np.generic]) -> NDArray[np.int64]:
    return plain.accept_or_draw(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arguments)).numpy()


def test_proposals_for_broken_logits_stay_in_the_vocabulary() -> None:
    nan, inf = math.nan, math.inf
    logits = np.array([[nan, nan], [-inf, -inf], [inf, 0.0], [-inf, 1.0], [nan, 1.0]], np.float32)
    one = np.ones(5)
    candidates, chances = np.tile([0, 1], (5, 1)), np.full((5, 2), 0.5, np.float32)
    for top_k, top_p, min_p in [(0, 1.0, 0.0), (1, 1.0, 0.0), (2, 0.5, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.5)]:
        parameters = one.astype(np.float32), np.full(5, top_k), one * top_p, one * min_p
        for token in (0, 1):
            ids = sampling.accept_or_draw(
                logits, *parameters, 0.9 * one, 0.9 * one, np.full(5, token), candidates, chances
            )
            assert ((ids >= 0) & (ids < 2)).all()
            assert ids[3] == ids[4] == 1


@pytest.mark.parametrize("k", [0, 1, 5, 20, 1000])
@pytest.mark.parametrize("vocab", [1000, 5001])
def test_logprobs(vocab: int, k: int) -> None:
    logits = random_logits(9, vocab)
    logits[::2] = np.round(logits[::2])
    ids = np.arange(9) * 7
    chosen, top_ids, top = sampling.logprobs(logits, ids, k)
    exact = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    np.testing.assert_allclose(chosen, exact[np.arange(9), ids], rtol=2e-6, atol=2e-6)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert (top_ids == order).all()
    np.testing.assert_allclose(top, np.take_along_axis(exact, order, 1), rtol=2e-6, atol=2e-6)


def test_logprobs_of_broken_logits() -> None:
    logits = np.array([[math.nan, 1.0, -math.inf]], np.float32)
    chosen, top_ids, top = sampling.logprobs(logits, np.array([1]), 3)
    assert chosen[0] == 0.0
    assert top_ids.tolist() == [[1, 2, -1]]
    assert top[0, 0] == 0.0
    assert top[0, 1] == -math.inf
    assert math.isnan(top[0, 2])


def test_changes_of_logits() -> None:
    before = random_logits(4, 50)
    who, tokens = np.array([2, 0]), np.array([[3, 7, 3], [49, 0, 49]])
    amounts = np.array([[1.0, -2.0, 1.0], [0.5, -math.inf, 0.5]], np.float32)
    got, expected = before.copy(), before.copy()
    sampling.add(got, who, tokens, amounts)
    np.add.at(expected, (who[:, None], tokens), amounts)
    assert (got == expected).all()

    got, expected, factors = before.copy(), before.copy(), np.array([1.5, 0.7], np.float32)
    sampling.penalise(got, who, tokens, amounts, factors)
    some = expected[who[:, None], tokens] - amounts
    expected[who[:, None], tokens] = np.where(some > 0, some / factors[:, None], some * factors[:, None])
    np.testing.assert_array_equal(got, expected)

    got = before.copy()
    sampling.add(got, np.array([1, 1, 3]), np.array([5, 5, 6]), np.array([1.0, 2.0, 3.0], np.float32))
    assert got[1, 5] == (before[1, 5] + np.float32(1.0)) + np.float32(2.0)
    assert got[3, 6] == before[3, 6] + np.float32(3.0)
    assert (got != before).sum() == 2


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_forbid(vocab: int) -> None:
    generator = np.random.default_rng(vocab)
    allowed = generator.random((2, vocab)) < 0.3
    words = np.zeros((2, -(-vocab // 32) + 1), np.int32)
    packed = np.packbits(allowed, axis=1, bitorder="little")
    words.view(np.uint8)[:, : packed.shape[1]] = packed
    before = random_logits(3, vocab)
    logits = before.copy()
    sampling.forbid(logits, np.array([2, 0]), words)
    assert (logits[1] == before[1]).all()
    for row, bits in ((2, allowed[0]), (0, allowed[1])):
        np.testing.assert_array_equal(logits[row], np.where(bits, before[row], -np.inf))


def test_rows_and_tokens_that_do_not_exist_are_refused() -> None:
    logits, none = random_logits(2, 10), np.zeros((1, 1), np.float32)
    for row, token in ((2, 0), (-1, 0), (0, 10), (0, -1)):
        with pytest.raises(IndexError, match="logits"):
            sampling.add(logits, np.array([row]), np.array([[token]]), none)
        with pytest.raises(IndexError, match="logits"):
            sampling.penalise(logits, np.array([row]), np.array([[token]]), none, np.ones(1, np.float32))
    with pytest.raises(IndexError, match="forbid"):
        sampling.forbid(random_logits(1, 33), np.array([0]), np.zeros((1, 1), np.int32))
    with pytest.raises(IndexError, match="logprobs"):
        sampling.logprobs(logits, np.array([0, 10]), 1)
    with pytest.raises(IndexError, match="logprobs"):
        sampling.logprobs(logits, np.array([0, 1]), 11)
    assert (logits == random_logits(2, 10)).all()


def test_threads_do_not_change_draws(one_thread_after: None) -> None:
    rows = 12
    logits = random_logits(rows, 30000)
    settings = (
        np.ones(rows, np.float32),
        np.full(rows, 50),
        np.full(rows, 0.9),
        np.zeros(rows),
        np.linspace(0, 0.99, rows),
    )
    expected = sampling.draw_tokens(logits, *settings)
    _native.set_num_threads(3)
    assert (sampling.draw_tokens(logits, *settings) == expected).all()
