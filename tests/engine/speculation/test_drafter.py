"""What a draft model proposes is its own greedy continuation, whatever it computed before."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_app.engine.llm import LLM
from serve_app.engine.speculation.build_drafter import build_drafter
from serve_app.engine.speculation.draft_call import DraftCall, SampledTokens, SamplingChain
from serve_app.engine.speculation.draft_sampler import CANDIDATES, DraftSampler
from serve_app.engine.speculation.drafter import Drafter
from serve_app.kv_cache.block_pool import BlockPool
from serve_app.options import EngineConfig, ModelSource, SamplingParams

MODELS = Path(__file__).parents[2] / "data" / "models"
SOURCE = ModelSource(model=str(MODELS / "stories260K" / "hf"), dtype="f32")
CONFIG = EngineConfig(max_seqs=8, block_size=16, max_batched_tokens=64, prefill_chunk_tokens=24, device="cpu")


class Oracle:
    """The model's greedy continuations, by the engine."""

    def __init__(self) -> None:
        self._llm = LLM(SOURCE, config=EngineConfig(max_seqs=8, block_size=16, device="cpu"))

    def __call__(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        return [generation.token_ids for generation in self._llm.generate(prompts, sampling)]

    def close(self) -> None:
        self._llm.close()


@pytest.fixture(scope="module")
def greedy() -> Iterator[Oracle]:
    oracle = Oracle()
    yield oracle
    oracle.close()


class Made:
    """A drafter, and what a caller knows that it knows."""

    def __init__(self, pool_tokens: int = 2048, least_chance: float = 0.0, *, works_ahead: bool = True) -> None:
        config = replace(CONFIG, pool_tokens=pool_tokens)
        self.drafter: Drafter = build_drafter(SOURCE, config, least_chance=least_chance, works_ahead=works_ahead)
        self.told: dict[int, int] = {}

    def ask(
        self,
        texts: dict[int, list[int]],
        count: int,
        until_s: float | None = None,
        chains: Sequence[SamplingChain | None] | None = None,
    ) -> list[Any]:
        told = self.told
        calls = [
            DraftCall(i, told.get(i, 0), ids[told.get(i, 0) :], count, chain)
            for (i, ids), chain in zip(texts.items(), chains or [None] * len(texts), strict=True)
        ]
        self.told |= {i: len(ids) for i, ids in texts.items()}
        answers = self.drafter.propose(calls, until_s)
        self.check()
        return answers

    def check(self) -> None:
        pool = self.drafter.pool
        assert isinstance(pool, BlockPool)
        pool.check()

    def close(self) -> None:
        pool = self.drafter.pool
        for i in list(self.told):
            self.drafter.forget(i)
        assert pool.num_free == pool.num_total
        self.drafter.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Made]]:
    drafters: list[Made] = []

    def one(*args: Any, **options: Any) -> Made:
        drafters.append(Made(*args, **options))
        return drafters[-1]

    yield one
    for made in drafters:
        made.close()


def prompt(seed: int, count: int) -> list[int]:
    return [1, *random.Random(seed).choices(range(259, 512), k=count - 1)]


def test_it_drafts_what_other_software_says() -> None:
    [case] = [
        case
        for case in json.loads((MODELS / "stories40K-draft" / "golden.json").read_text())["cases"]
        if not case["prompt"]
    ]
    expected = case["draft_greedy_ids"]
    source = ModelSource(model=str(MODELS / "stories40K-draft" / "hf"), dtype="f32")
    drafter = build_drafter(source, CONFIG, least_chance=0.0)
    text = [1]
    for i in range(0, len(expected) - 4, 4):
        assert drafter.propose([DraftCall(0, max(0, len(text) - 4), text[max(0, len(text) - 4) :], 4)]) == [
            expected[i : i + 4]
        ]
        text += expected[i : i + 4]
    drafter.close()


def test_a_batch_whose_targets_accept_some_of_it(make: Callable[..., Made], greedy: Oracle) -> None:
    """Interleaved sequences of different lengths, of which some rest; accepted, rejected and replaced tokens."""
    made, rng = make(), random.Random(5)
    texts = {i: prompt(i, length) for i, length in enumerate([1, 5, 16, 17, 40, 90, 31, 64])}
    for round_ in range(12):
        asked = {i: texts[i] for i in rng.sample(sorted(texts), k=rng.randint(1, 8))}
        count = rng.randint(1, 6)
        answers = made.ask(asked, count)
        assert answers == greedy(list(asked.values()), count), round_
        others = {i: list(made.drafter._sequences[i].others) for i in asked}
        for _ in range(rng.choice([0, 0, 1, 3, 30])):
            made.drafter.advance()
            made.check()
        for i, drafted in zip(asked, answers, strict=True):
            assert drafted is not None
            accepted = drafted[: rng.randint(0, count)]
            second = others[i][len(accepted)] if len(accepted) < len(others[i]) else None
            drawn = second[0] if second and rng.random() < 0.7 else rng.randrange(259, 512)
            texts[i] = [*texts[i], *accepted, drawn]
    assert made.drafter.num_foreseen > 0


def test_what_is_sampled_comes_from_its_own_distribution(make: Callable[..., Made], greedy: Oracle) -> None:
    """Sampled and greedy sequences together, right and wrong tokens: candidates and chances are the model's."""
    made, rng = make(least_chance=0.3), random.Random(6)
    chains = [SamplingChain(0.7), None, SamplingChain(1.4, 5), SamplingChain(1.0, 0, 0.8), SamplingChain(min_p=0.1)]
    texts = {i: prompt(i, length) for i, length in enumerate([1, 5, 16, 17, 40])}
    with LLM(SOURCE, config=EngineConfig(max_seqs=8, block_size=16, device="cpu")) as llm:
        for _ in range(6):
            answers = made.ask(texts, 3, chains=chains)
            for i, (chain, drafted) in enumerate(zip(chains, answers, strict=True)):
                assert drafted is not None
                if chain is None:
                    assert drafted == greedy([texts[i]], 3)[0][: len(drafted)]
                    texts[i] = [*texts[i], *drafted[:1], 300]
                    continue
                assert isinstance(drafted, SampledTokens)
                assert len(drafted) == 3
                logits = llm.logits([*texts[i], *drafted])[len(texts[i]) - 1 : -1].double().numpy()
                for place in range(3):
                    check_chances(logits[place], chain, drafted.candidates[place], drafted.chances[place])
                    assert drafted.chances[place][drafted.candidates[place] == drafted[place]].sum() > 0
                accepted = drafted[: rng.randint(0, 3)]
                texts[i] = [*texts[i], *accepted, rng.randrange(259, 512)]
            for _ in range(rng.choice([0, 1, 5])):
                made.drafter.advance()


def check_chances(logits: Any, chain: SamplingChain, candidates: Any, chances: Any) -> None:
    best = np.argsort(-logits, kind="stable")[:CANDIDATES]
    assert candidates.tolist() == best.tolist()
    wanted = np.exp((logits[best] - logits[best[0]]) / chain.temperature)
    if chain.top_k:
        wanted[chain.top_k :] = 0
    wanted /= wanted.sum()
    if chain.top_p < 1:
        wanted[np.cumsum(wanted) - wanted >= chain.top_p] = 0
    wanted[wanted < chain.min_p * wanted[0]] = 0
    assert chances == pytest.approx(wanted / wanted.sum(), abs=2e-5)
    assert chances.sum() == pytest.approx(1, abs=1e-6)


def test_what_was_sampled_otherwise_is_not_proposed(make: Callable[..., Made], greedy: Oracle) -> None:
    made = make()
    text, hot, cold = prompt(1, 20), SamplingChain(1.5), SamplingChain(0.1)
    [first] = made.ask({0: text}, 4, chains=[hot])
    for _ in range(5):
        made.drafter.advance()
    # The same again: nothing was said against it.
    [again] = made.ask({0: text}, 4, chains=[hot])
    assert (list(again), again.chances.tolist()) == (list(first), first.chances.tolist())
    [other] = made.ask({0: text}, 4, chains=[cold])
    assert other.chances[0].max() > first.chances[0].max() + 0.1
    assert made.ask({0: text}, 4) == greedy([text], 4)
    # What was accepted, with the draft's own next token behind it, is drafted already, and keeps its chances.
    [five] = made.ask({0: text}, 5, chains=[hot])
    forwards = made.drafter.num_forwards
    [rest] = made.ask({0: [*text, *five[:3]]}, 2, chains=[hot])
    assert (list(rest), rest.candidates.tolist()) == (list(five[3:]), five[3:].candidates.tolist())
    assert made.drafter.num_forwards == forwards
    # A place that was rejected is dropped, with all behind it.
    wrong = [*text, *five[:3], next(i for i in range(300, 500) if i != five[3])]
    [anew] = made.ask({0: wrong}, 2, chains=[hot])
    assert made.drafter.num_forwards > forwards
    assert (len(anew), len(made.drafter._sequences[0].drawn_from)) == (2, 2)


def test_tokens_are_sampled_as_often_as_their_chances_say() -> None:
    logprobs = -np.sort(-np.random.default_rng(3).normal(0, 1.5, 12).astype(np.float32))
    count, chain = 50_000, SamplingChain(1.3, 0, 0.95)
    ids = np.random.default_rng(4).permutation(1000)[:12]
    rows = np.tile(ids, (count, 1)), np.tile(logprobs, (count, 1)), [chain] * count
    drawn, candidates, chances = DraftSampler(1).draw(*rows)
    assert (candidates == ids).all()
    assert (chances == chances[0]).all()
    is_possible = chances[0] > 0
    assert 3 < is_possible.sum() < 12
    seen = (drawn[:, None] == ids).sum(axis=0)
    assert not seen[~is_possible].any()
    expected = count * chances[0][is_possible].astype(np.float64)
    # Of at most eleven squares: once in ten thousand seeds.
    assert ((seen[is_possible] - expected) ** 2 / expected).sum() < 37
    # Another time other ones.
    assert (DraftSampler().draw(*rows)[0] != drawn).any()


def test_what_is_no_number_is_not_sampled() -> None:
    nan = float("nan")
    ids = np.array([[4, 7, -1], [-1, -1, -1]])
    logprobs = np.array([[-0.5, -1.0, nan], [nan, nan, nan]], np.float32)
    drawn, candidates, chances = DraftSampler(1).draw(ids, logprobs, [SamplingChain()] * 2)
    assert drawn[0] in (4, 7)
    assert (drawn[1], candidates.min()) == (0, 0)
    assert chances.ravel().tolist() == pytest.approx([0.6225, 0.3775, 0, 1, 0, 0], abs=1e-4)


def test_what_has_no_token_is_not_sampled() -> None:
    """A model may have more rows than there are tokens."""
    ids = np.array([[9, 2, 8, 1], [2, 1, 0, 3], [9, 8, 7, 6]])
    logprobs = np.array([[-0.1, -1.0, -1.5, -2.0]] * 3, np.float32)
    chains = [SamplingChain(1.0, 1), SamplingChain(1.0, 1), SamplingChain()]
    drawn, candidates, chances = DraftSampler(1, 5).draw(ids, logprobs, chains)
    assert drawn.tolist() == [2, 2, 0]
    assert candidates.tolist() == [[2, 1, 0, 0], [2, 1, 0, 3], [0] * 4]
    assert chances.tolist() == [[1, 0, 0, 0]] * 3


def test_sequences_that_want_fewer_drop_out(make: Callable[..., Made], greedy: Oracle) -> None:
    made = make()
    prompts = [prompt(1, 9), prompt(2, 30), prompt(3, 3)]
    calls = [DraftCall(i, 0, ids, count) for i, (ids, count) in enumerate(zip(prompts, [1, 6, 3], strict=True))]
    made.told = dict.fromkeys(range(3), 0)
    [one], [six], [three] = greedy(prompts[:1], 1), greedy(prompts[1:2], 6), greedy(prompts[2:], 3)
    assert made.drafter.propose(calls) == [one, six, three]


def test_what_was_accepted_is_drafted_already(make: Callable[..., Made], greedy: Oracle) -> None:
    made = make()
    text = prompt(1, 20)
    [expected] = greedy([text], 20)
    assert made.ask({0: text}, 4) == [expected[:4]]
    while made.drafter.advance():
        made.check()
    forwards = made.drafter.num_forwards
    # Four accepted, and the bonus token is the draft's own next one.
    assert made.ask({0: text + expected[:5]}, 4) == [expected[5:9]]
    assert made.drafter.num_forwards == forwards
    # All but one rejected: nothing of it holds.
    other = [*text, *expected[:6], (expected[6] + 1) % 512]
    assert made.ask({0: other}, 4) == greedy([other], 4)
    assert made.drafter.num_forwards > forwards


def test_likely_outcomes_are_drafted_already(make: Callable[..., Made], greedy: Oracle) -> None:
    """Each in turn is what the target draws."""
    text = prompt(1, 45)
    places, number, num_outcomes = set(), 0, 2
    while number < num_outcomes:
        made = make()
        [drafted] = made.ask({0: text}, 4)
        assert drafted is not None
        while made.drafter.advance():
            made.check()
        outcomes = made.drafter._sequences[0].outcomes
        num_outcomes = len(outcomes)
        place, token_id = list(outcomes)[number]
        places.add(place)
        number += 1
        going_on = [*text, *drafted, *greedy([text + drafted], 1)[0]]
        told = [*going_on[:place], token_id]
        assert token_id != going_on[place]
        forwards = made.drafter.num_forwards
        assert made.ask({0: told}, 4) == greedy([told], 4)
        assert (made.drafter.num_forwards, made.drafter.num_foreseen) == (forwards, 1)
        # And goes on from there.
        assert not made.drafter._sequences[0].outcomes
        told += greedy([told], 2)[0]
        assert made.ask({0: told}, 4) == greedy([told], 4)
    assert len(places) > 1


def test_outcomes_give_their_blocks_to_calls(make: Callable[..., Made], greedy: Oracle) -> None:
    made, text = make(pool_tokens=96), prompt(2, 60)
    made.ask({0: prompt(1, 45)}, 4)
    while made.drafter.advance():
        made.check()
    assert made.drafter._sequences[0].outcomes
    assert made.drafter.pool.num_free < 4
    assert made.ask({1: text}, 4) == greedy([text], 4)
    assert made.drafter.num_evictions == 1
    assert not made.drafter._sequences[0].outcomes


def test_without_working_ahead_there_is_nothing_to_do(make: Callable[..., Made]) -> None:
    made = make(works_ahead=False)
    made.ask({0: prompt(1, 20)}, 4)
    assert not made.drafter.advance()


def test_prompts_are_computed_in_idle_time(make: Callable[..., Made], greedy: Oracle) -> None:
    made = make()
    long = prompt(1, 200)
    for start in range(0, 200, 64):
        made.drafter.feed(0, long[start : start + 64], start)
    made.told[0] = 200
    # A call with a limit does not wait for a prompt, and is not made to wait by it.
    assert made.ask({0: long, 1: prompt(2, 9)}, 3, until_s=float("inf")) == [[], *greedy([prompt(2, 9)], 3)]
    while made.drafter.advance():
        made.check()
    forwards = made.drafter.num_forwards
    assert made.ask({0: long}, 1, until_s=float("inf")) == greedy([long], 1)
    assert made.drafter.num_forwards == forwards
    made.drafter.feed(7, long, 5)
    assert made.drafter.propose([DraftCall(7, 5, long[:3], 3)]) == [None]


@pytest.mark.parametrize(("idle_s", "least", "most"), [(0.0, 12, 14), (100.0, 9, 10)])
def test_idle_work_is_done_in_parts_for_which_a_call_can_wait(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, idle_s: float, least: int, most: int
) -> None:
    monkeypatch.setattr("serve_app.engine.speculation.drafter.IDLE_S", idle_s)
    made = make()
    made.drafter.feed(0, prompt(1, 200), 0)
    made.told[0] = 200
    while made.drafter.advance():
        pass
    assert least <= made.drafter.num_forwards <= most


def test_nothing_is_begun_after_the_limit(make: Callable[..., Made]) -> None:
    made = make()
    assert made.ask({0: prompt(1, 5)}, 3, until_s=0.0) == [[]]
    assert made.drafter.num_forwards == 0


def test_those_unused_longest_give_their_blocks(make: Callable[..., Made], greedy: Oracle) -> None:
    made = make(pool_tokens=160)
    texts = {i: prompt(i, 40) for i in range(6)}
    for _ in range(2):
        for i, text in texts.items():
            assert made.ask({i: text}, 4) == greedy([text], 4)
            texts[i] = [*text, 300 + i]
    assert made.drafter.num_evictions > 6
    # More at once than there is room for: some get nothing, nobody anything wrong.
    expected = greedy(list(texts.values()), 3)
    answers = made.ask(texts, 3)
    assert [] in answers
    assert sum(a == e for a, e in zip(answers, expected, strict=True)) >= 2
    assert all(a == e[: len(a)] for a, e in zip(answers, expected, strict=True) if a is not None)


def test_unknown_sequences_and_bases_are_said_to_be_so(make: Callable[..., Made], greedy: Oracle) -> None:
    made = make()
    text = prompt(1, 20)
    made.told[0] = 0
    assert made.drafter.propose([DraftCall(0, 10, text[10:], 4)]) == [None]
    assert made.drafter.propose([DraftCall(0, 0, text[:10], 4)]) == greedy([text[:10]], 4)
    assert made.drafter.propose([DraftCall(0, 15, text[15:], 4)]) == [None]
    assert made.drafter.propose([DraftCall(0, 10, text[10:], 4)]) == greedy([text], 4)
    # A base before what is known: the text is another one from there on, or the same as it was.
    other = [*text[:5], 400, 401]
    assert made.drafter.propose([DraftCall(0, 5, [400, 401], 4)]) == greedy([other], 4)
    assert made.drafter.propose([DraftCall(0, 5, [], 4)]) == greedy([text[:5]], 4)
    made.drafter.forget(0)
    assert made.drafter.propose([DraftCall(0, 5, [400], 4)]) == [None]


def test_a_text_longer_than_the_model_allows_gets_nothing(make: Callable[..., Made], greedy: Oracle) -> None:
    made = make()
    text = prompt(1, 508)
    [expected] = greedy([text], 4)
    answers = made.ask({0: text}, 8)
    assert answers[0] is not None
    assert len(answers[0]) >= 4
    assert answers[0][:4] == expected
    assert made.ask({0: [*text, *range(300, 330)]}, 8) == [[]]


def test_a_draft_ends_where_the_model_is_in_doubt(make: Callable[..., Made], greedy: Oracle) -> None:
    text = prompt(1, 20)
    sure, doubting = make(), make(least_chance=0.5)
    [expected] = sure.ask({0: text}, 32)
    assert expected is not None
    chances = sure.drafter._sequences[0].chances
    known: list[int] = []
    while len(known) < 24:
        [drafted] = doubting.ask({0: text + known}, 8)
        assert drafted is not None
        first = len(known)
        certain = next((i for i, p in enumerate(chances[first : first + 8]) if p < 0.5), 8)
        assert drafted == expected[first : first + certain]
        known += expected[first : first + certain + 1]
        for _ in range(first % 5):
            doubting.drafter.advance()
