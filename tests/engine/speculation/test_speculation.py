"""Engines that speculate say what they say without, by whichever proposer, alone and in a crowd."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.engine.build import build_engine
from serve_app.engine.llm import LLM, Generation
from serve_app.engine.speculation.build_drafter import build_drafter
from serve_app.engine.speculation.control import SpeculationControl
from serve_app.engine.speculation.local_proposer import LocalProposer
from serve_app.engine.speculation.proposer import DraftWish, no_work
from serve_app.engine.stats import SpeculationCounts
from serve_app.messages import GenerateRequest, TokenDelta
from serve_app.options import (
    DryParams,
    EngineConfig,
    ModelSource,
    RequestSpeculation,
    SamplingParams,
    Speculate,
    SpeculationOptions,
)

MODELS = Path(__file__).parents[2] / "data" / "models"
PAIRS = {
    "stories260K": (MODELS / "stories260K" / "stories260K-F32.gguf", MODELS / "stories40K-draft" / "hf"),
    "stories3M": (MODELS / "stories3M" / "stories3M-F32.gguf", MODELS / "stories260K" / "stories260K-F32.gguf"),
}
CONFIG = EngineConfig(max_seqs=32, block_size=16, prefill_chunk_tokens=16, max_batched_tokens=96, num_threads=1)
BEGINNINGS = ("Once upon a time", "The little dog", "Lily and Tom went to the park and saw", "One day, a big", "In the")
MANNERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_k": 20, "top_p": 0.9, "frequency_penalty": 0.4},
    {"temperature": 0.0, "repetition_penalty": 1.2, "logprobs": 2},
    {"temperature": 0.8, "seed": 3, "n": 2, "stop": ("big", "happy")},
    {"temperature": 0.7, "seed": 4, "min_p": 0.05, "dry": DryParams(multiplier=0.8), "ignore_eos": True},
    {"temperature": 1.0, "seed": 5, "speculation": RequestSpeculation(max_tokens=1)},
]


def proposer_of(pair: str, use: Speculate, config: EngineConfig = CONFIG) -> LocalProposer | None:
    """Over the pair's draft model, where that is used."""
    if use not in ("draft", "auto"):
        return None
    return LocalProposer(build_drafter(ModelSource(model=str(PAIRS[pair][1])), config))


def generate(
    pair: str, count: int, options: SpeculationOptions | None, config: EngineConfig = CONFIG
) -> tuple[list[Generation], SpeculationCounts | None]:
    """count requests at once; options None: without speculation."""
    with LLM(str(PAIRS[pair][0]), config=config) as llm:
        proposer = None
        if options is not None:
            proposer = proposer_of(pair, options.use, config)
            llm.engine.speculate(options, proposer)
        prompts = [f"{BEGINNINGS[i % 5]} number {i}" for i in range(count)]
        sampling = [
            SamplingParams().with_overrides({"max_tokens": 60, **MANNERS[i % len(MANNERS)]}) for i in range(count)
        ]
        said = llm.generate(prompts, sampling), llm.engine.stats().speculation
        if proposer is not None:
            proposer.close()
        return said


def check(plain: list[Generation], drafted: list[Generation]) -> None:
    for a, b in zip(plain, drafted, strict=True):
        assert [c.token_ids for c in a.choices] == [c.token_ids for c in b.choices]
        assert [c.text for c in a.choices] == [c.text for c in b.choices]
        ends = [[(c.finish.reason, c.finish.stop_reason) for c in one.choices if c.finish] for one in (a, b)]
        assert ends[0] == ends[1]
        for x, y in zip(a.choices, b.choices, strict=True):
            assert [p.logprob for p in x.logprobs or ()] == pytest.approx([p.logprob for p in y.logprobs or ()])


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, int], list[Generation]]:
    return {(pair, count): generate(pair, count, None)[0] for pair in PAIRS for count in (1, 32)}


@pytest.mark.parametrize("use", ["draft", "ngram", "suffix", "auto"])
@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("pair", PAIRS)
def test_texts_are_those_without(
    pair: str, count: int, use: Speculate, plain: dict[Any, list[Generation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is known of times: what is chosen hangs on acceptance alone, and not on this machine.
    for name in ("warm_up", "note_step", "note_proposal"):
        monkeypatch.setattr(SpeculationControl, name, lambda *args: None)
    said, counts = generate(pair, count, SpeculationOptions(use, 4, is_fixed=use != "auto"))
    check(plain[pair, count], said)
    assert counts is not None
    if use == "draft":
        assert counts.drafted["draft"] > 20 * count
        assert 0 < counts.accepted["draft"] < counts.drafted["draft"]
    elif count > 1:
        assert sum(counts.drafted.values()) > 0
    if use == "auto":
        assert sum(counts.drafted.values()) > 20 * count
    assert sum(counts.accepted_by_position) == sum(counts.accepted.values())
    assert counts.tokens == counts.steps + sum(counts.accepted.values())


@pytest.mark.parametrize("pair", PAIRS)
def test_texts_of_requests_with_seeds_where_drafts_are_sampled(pair: str, plain: dict[Any, list[Generation]]) -> None:
    """Beside as many without, whose drafts are sampled: the same."""
    options = SpeculationOptions("draft", 4, is_fixed=True, draft_sampling="sampled")
    with LLM(str(PAIRS[pair][0]), config=CONFIG) as llm:
        proposer = proposer_of(pair, "draft")
        llm.engine.speculate(options, proposer)
        sampled = SamplingParams(temperature=1.0, max_tokens=60)
        prompts = [f"{BEGINNINGS[i % 5]} number {i}" for i in range(32)]
        sampling = [SamplingParams().with_overrides({"max_tokens": 60, **MANNERS[i % len(MANNERS)]}) for i in range(32)]
        said = llm.generate(prompts * 2, sampling + [sampled] * 32)
        assert proposer is not None
        proposer.close()
    check(plain[pair, 32], said[:32])


UNSEEDED: list[dict[str, Any]] = [
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 0.9, "n": 2, "logprobs": 0},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "frequency_penalty": 0.4, "logprobs": 1},
    {"temperature": 0.8, "stop": ("big", "happy", "the")},
    {"temperature": 0.7, "min_p": 0.05, "dry": DryParams(multiplier=0.8), "ignore_eos": True},
    {"temperature": 1.0, "speculation": RequestSpeculation(max_tokens=1), "ignore_eos": True},
    {"temperature": 1.0, "max_tokens": 2, "ignore_eos": True},
]


@pytest.mark.parametrize("pool_tokens", [None, 400])
def test_requests_whose_drafts_are_sampled(pool_tokens: int | None) -> None:
    """Logprobs are of the tokens that came, texts end where they should, and every token is counted. With few blocks
    requests are preempted again and again."""
    options = SpeculationOptions("draft", 4, is_fixed=True, draft_sampling="sampled")
    with LLM(str(PAIRS["stories260K"][0]), config=replace(CONFIG, pool_tokens=pool_tokens)) as llm:
        proposer = proposer_of("stories260K", "draft")
        assert proposer is not None
        llm.engine.speculate(options, proposer)
        prompts = [f"{BEGINNINGS[i % 5]} number {i}" for i in range(21)]
        sampling = [SamplingParams().with_overrides({"max_tokens": 50, **UNSEEDED[i % 7]}) for i in range(21)]
        said = llm.generate(prompts, sampling)
        counts = llm.engine.stats().speculation
        proposer.close()
        for generation, params in zip(said, sampling, strict=True):
            assert len(generation.choices) == params.n
            if params.n == 2:
                assert generation.choices[0].token_ids != generation.choices[1].token_ids
            for choice in generation.choices:
                finish = choice.finish
                assert finish is not None
                assert finish.usage.completion_tokens == len(choice.token_ids) <= params.max_tokens
                assert (finish.reason == "length") == (len(choice.token_ids) == params.max_tokens)
                assert not any(word in choice.text for word in params.stop)
                if params.logprobs is None:
                    continue
                assert choice.logprobs is not None
                raw = llm.logits([*generation.prompt_ids, *choice.token_ids])[len(generation.prompt_ids) - 1 : -1]
                wanted = raw.log_softmax(-1)[range(len(choice.token_ids)), choice.token_ids].tolist()
                assert [p.logprob for p in choice.logprobs] == pytest.approx(wanted, abs=1e-4)
    assert counts is not None
    assert 100 < counts.accepted["draft"] < counts.drafted["draft"]
    assert sum(counts.accepted_by_position) == counts.accepted["draft"]
    assert counts.tokens == counts.steps + counts.accepted["draft"]


def test_more_is_accepted_of_sampled_drafts() -> None:
    """Of the same number of tokens, at temperature 1."""
    rates = {}
    for draft_sampling in ("greedy", "sampled"):
        with LLM(str(PAIRS["stories260K"][0]), config=replace(CONFIG, seed=1)) as llm:
            draft = build_drafter(ModelSource(model=str(PAIRS["stories260K"][1])), CONFIG, least_chance=0.0, seed=1)
            proposer = LocalProposer(draft)
            options = SpeculationOptions("draft", 4, is_fixed=True, draft_sampling=draft_sampling)
            llm.engine.speculate(options, proposer)
            sampling = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True)
            llm.generate([f"{BEGINNINGS[i % 5]} number {i}" for i in range(32)], sampling)
            counts = llm.engine.stats().speculation
            proposer.close()
        assert counts is not None
        rates[draft_sampling] = counts.accepted["draft"] / counts.drafted["draft"]
    assert rates["sampled"] > rates["greedy"] + 0.05


def test_texts_where_blocks_run_out(plain: dict[Any, list[Generation]]) -> None:
    """Preempted again and again."""
    small = EngineConfig(
        max_seqs=32, block_size=16, prefill_chunk_tokens=16, max_batched_tokens=96, num_threads=1, pool_tokens=400
    )
    said, counts = generate("stories260K", 32, SpeculationOptions("draft", 4, is_fixed=True), small)
    check(plain["stories260K", 32], said)
    assert counts is not None
    assert counts.accepted["draft"] > 100


def test_a_request_may_refuse() -> None:
    target, _ = PAIRS["stories260K"]
    with LLM(str(target), config=CONFIG) as llm:
        llm.engine.speculate(SpeculationOptions("suffix", 4, is_fixed=True))
        off = SamplingParams(temperature=0.0, max_tokens=40, speculation=RequestSpeculation(enabled=False))
        llm.generate("Once upon a time", off)
        counts = llm.engine.stats().speculation
    assert counts is not None
    assert not any(counts.drafted.values())
    assert not any(counts.gamma.values())


class Repeats:
    """Proposes the last token again, and remembers what it was told."""

    name = "draft"
    is_open = True
    num_timeouts = 3

    def __init__(self) -> None:
        self.told: list[Any] = []

    def admit(self, sequence: int, token_ids: Sequence[int], scope: bytes = b"") -> None:
        self.told.append(("admit", list(token_ids), scope))

    def propose(self, wishes: Sequence[DraftWish], meanwhile: Callable[[], None] = no_work) -> list[list[int]]:
        return [[wish.token_ids[-1]] * wish.max_tokens for wish in wishes]

    def forget(self, sequence: int, token_ids: Sequence[int] = ()) -> None:
        self.told.append(("forget", list(token_ids)))

    def close(self) -> None:
        self.told.append("close")


def test_what_a_proposer_is_told_and_what_is_counted() -> None:
    proposer = Repeats()
    with LLM(str(PAIRS["stories260K"][0]), config=CONFIG) as llm:
        llm.engine.speculate(SpeculationOptions("draft", 3, is_fixed=True), proposer)
        prompt = llm.tokenizer.encode("Once upon a time")
        # The bias makes one token likely again and again.
        bias = ((prompt[1], 30.0),)
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logit_bias=bias)
        said = llm.generate(prompt, sampling)[0].token_ids
        counts = llm.engine.stats().speculation
    assert said == [prompt[1]] * 12
    assert proposer.told == [("admit", prompt, b""), ("forget", prompt + said)]
    assert counts is not None
    # One token of the prompt, four of two steps of three drafts each, three of one with two.
    assert (counts.steps, counts.tokens, counts.drafted, counts.accepted) == (3, 11, {"draft": 8}, {"draft": 8})
    assert counts.accepted_by_position == [3, 3, 2]
    assert (counts.gamma, counts.timeouts) == ({0: 0, 1: 0, 2: 1, 3: 2}, 3)
    assert counts.verify_seconds > 0
    assert (counts.verify_steps, counts.draft_waits) == (3, 3)


class Waits(Repeats):
    """Works elsewhere: how much had been handed on when it was asked, and when it had to answer."""

    def __init__(self, handed_on: list[TokenDelta]) -> None:
        super().__init__()
        self._handed_on = handed_on
        self.seen: list[tuple[int, int, int]] = []

    def propose(self, wishes: Sequence[DraftWish], meanwhile: Callable[[], None] = no_work) -> list[list[int]]:
        num_before = len(self._handed_on)
        meanwhile()
        self.seen.append((num_before, len(self._handed_on), len(wishes[0].token_ids) - wishes[0].num_prompt))
        return super().propose(wishes)


def test_a_draft_is_asked_before_the_last_tokens_are_handed_on() -> None:
    handed_on: list[TokenDelta] = []
    is_done = threading.Event()

    def on_deltas(deltas: list[TokenDelta]) -> None:
        handed_on.extend(deltas)
        if deltas[-1].finish is not None:
            is_done.set()

    engine = build_engine(ModelSource(str(PAIRS["stories260K"][0])), CONFIG, on_deltas)
    proposer = Waits(handed_on)
    engine.speculate(SpeculationOptions("draft", 2, is_fixed=True), proposer)
    engine.start()
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
        engine.add(GenerateRequest("r", [5, 6, 7], sampling))
        assert is_done.wait(30)
    finally:
        engine.stop()
    assert [delta.index for delta in handed_on] == list(range(30))
    assert len(proposer.seen) > 5
    # All that is known at each question, but what the last step brought was not handed on before it.
    for (before, after, known), (_, last, _) in zip(proposer.seen[1:], proposer.seen, strict=False):
        assert before == last < after
        assert sum(len(delta.token_ids) for delta in handed_on[:after]) == known


@pytest.mark.parametrize(("use", "is_fixed"), [("draft", True), ("draft", False), ("auto", False), ("auto", True)])
def test_a_proposer_that_is_away(use: Speculate, is_fixed: bool) -> None:
    """It is neither asked nor counted, others are in its place, and nothing is held against it when it is back."""
    proposer = Repeats()
    proposer.is_open = False
    with LLM(str(PAIRS["stories260K"][0]), config=CONFIG) as llm:
        llm.engine.speculate(SpeculationOptions(use, 3, is_fixed=is_fixed), proposer)
        prompt = llm.tokenizer.encode("Once upon a time")
        sampling = SamplingParams(
            temperature=0.0, max_tokens=200, ignore_eos=True, logit_bias=((prompt[1], 30.0),),
        )  # fmt: skip

        def run() -> SpeculationCounts:
            llm.generate([prompt] * 4, sampling)
            counts = llm.engine.stats().speculation
            assert counts is not None
            return counts

        away = run()
        proposer.is_open = True
        back = run()
    assert away.drafted["draft"] == 0
    if use == "draft":
        assert (sum(away.gamma.values()), away.draft_waits, away.verify_steps) == (0, 0, 0)
    else:
        assert sum(away.accepted.values()) > 0
    if is_fixed or use == "draft":
        assert back.accepted["draft"] > 10
    assert sum(back.gamma.values()) > sum(away.gamma.values())


def test_a_chunk_limits_each_request_and_a_batch_all_together() -> None:
    """Chunks of 16 tokens, batches of 96: 32 requests with drafts of 5 tokens would be 192."""
    with LLM(str(PAIRS["stories260K"][0]), config=CONFIG) as llm:
        engine, steps = llm.engine, []
        engine.speculate(SpeculationOptions("draft", 5, is_fixed=True), Repeats())
        build = engine.parts.builder.build

        def record(schedule: Any, wanted: Any) -> Any:
            steps.append((len(schedule.decode), schedule.num_drafted))
            return build(schedule, wanted)

        engine.parts.builder.build = record  # type: ignore[method-assign]
        sampling = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
        llm.generate([f"{BEGINNINGS[i % 5]} {i}" for i in range(32)], sampling)
    assert (32, 64) in steps
    assert all(num_decodes + num_drafted <= 96 for num_decodes, num_drafted in steps)


def test_of_long_prompts_only_what_the_step_computes_is_weighed() -> None:
    config = EngineConfig(max_seqs=4, block_size=16, prefill_chunk_tokens=16, max_batched_tokens=40)
    with LLM(str(PAIRS["stories260K"][0]), config=config) as llm:
        llm.engine.speculate(SpeculationOptions("ngram", 4))
        assert llm.engine._speculation is not None
        control, seen = llm.engine._speculation._control, []
        choose = control.choose

        def record(wanted: Any, num_others: int, num_prompts: int) -> Any:
            seen.append((num_others, num_prompts))
            return choose(wanted, num_others, num_prompts)

        control.choose = record  # type: ignore[method-assign, assignment]
        prompts = [[1] + [300 + i] * length for i, length in enumerate((3, 100, 150, 200))]
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    # Three chunks of 16 beside one that decodes are more than a step of 40.
    assert max(seen) == (39, 3)
    assert (16, 1) in seen
