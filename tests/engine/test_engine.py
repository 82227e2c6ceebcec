"""The engine's bookkeeping, without a model: the null runner's ids depend on seed and position alone."""

import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from queue import Queue

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from serve_app.engine.engine import Engine
from serve_app.engine.model_runner import StepResult
from serve_app.errors import ContextTooLong, EngineFailed, InvalidRequest, QueueFull, Unavailable
from serve_app.kv_cache.block_ledger import NO_BLOCK
from serve_app.messages import GenerateRequest, TokenDelta
from serve_app.options import EngineConfig, SamplingParams

CONFIG = EngineConfig(max_seqs=8, block_size=16, max_batched_tokens=64, prefill_chunk_tokens=32, max_waiting=64)
MakeEngine = Callable[..., Engine]


def request(name: str, prompt: list[int], **sampling: object) -> GenerateRequest:
    params = SamplingParams().with_overrides({"seed": 5, "max_tokens": 20, "ignore_eos": True, **sampling})
    return GenerateRequest(name, prompt, params)


def run(engine: Engine, max_steps: int = 10_000) -> dict[tuple[str, int], list[TokenDelta]]:
    """Steps until nothing is left; the deltas of each choice, checked for gaps and a single end."""
    taken: dict[tuple[str, int], list[TokenDelta]] = defaultdict(list)
    while engine.has_requests:
        max_steps -= 1
        assert max_steps > 0, "the engine makes no progress"
        for delta in engine.step():
            deltas = taken[delta.request_id, delta.choice]
            assert delta.index == sum(len(d.token_ids) for d in deltas)
            assert not deltas or deltas[-1].finish is None
            deltas.append(delta)
    assert all(deltas[-1].finish is not None for deltas in taken.values())
    return taken


def ids(deltas: list[TokenDelta]) -> list[int]:
    return [i for delta in deltas for i in delta.token_ids]


def expected(engine: Engine, seed: int, num_prompt: int, count: int) -> list[int]:
    runner = engine.parts.runner
    return [int(runner.expected(seed % 1009, position)) for position in range(num_prompt, num_prompt + count)]  # type: ignore[attr-defined]


def test_ids_text_usage_and_end(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    engine.add(request("a", [1, 300, 301]))
    deltas = run(engine)["a", 0]
    assert ids(deltas) == expected(engine, 5, 3, 20)
    assert "".join(d.text for d in deltas) == engine.parts.tokenizer.decode(ids(deltas))
    finish = deltas[-1].finish
    assert finish is not None
    assert finish.reason == "length"
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (3, 20)


def test_second_request_finds_the_first_ones_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    prompt = [1, *range(260, 300)]
    for name, cached in (("a", 0), ("b", 32)):
        engine.add(request(name, prompt))
        finish = run(engine)[name, 0][-1].finish
        assert finish is not None
        assert finish.usage.cached_tokens == cached
    other_tenant = request("c", prompt)
    other_tenant.cache_salt = b"somebody else"
    engine.add(other_tenant)
    finish = run(engine)["c", 0][-1].finish
    assert finish is not None
    assert finish.usage.cached_tokens == 0


@pytest.mark.parametrize("num_prompt", [1, 2, 16, 17, 33, 50])
def test_choices_share_the_prompt(make_engine: MakeEngine, num_prompt: int) -> None:
    engine = make_engine(replace(CONFIG, prefix_cache_n=0))
    engine.add(request("a", [1] + [300] * (num_prompt - 1), n=4, max_tokens=10))
    outputs = run(engine)
    assert len({tuple(ids(deltas)) for deltas in outputs.values()}) == 4
    # The prompt is computed once, plus its last token for each further choice.
    assert engine.stats().prompt_tokens == num_prompt
    assert ids(outputs["a", 0]) == expected(engine, 5, num_prompt, 10)


def test_more_choices_than_rows(make_engine: MakeEngine) -> None:
    engine = make_engine(replace(CONFIG, max_seqs=2))
    engine.add(request("a", [1] * 20, n=7))
    assert len(run(engine)) == 7


def test_stop_string_across_tokens_ends_and_cuts(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    engine.add(request("a", [1, 300], max_tokens=60))
    text = "".join(d.text for d in run(engine)["a", 0])
    stop = text[7:14]
    cut = text.index(stop)
    engine.add(request("b", [1, 300], max_tokens=60, stop=(stop,)))
    deltas = run(engine)["b", 0]
    assert "".join(d.text for d in deltas) == text[:cut]
    finish = deltas[-1].finish
    assert finish is not None
    assert (finish.reason, finish.stop_reason) == ("stop", stop)


def test_stop_ids_and_end_of_text(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    fourth = expected(engine, 5, 2, 4)[3]
    engine.add(request("a", [1, 300], stop_token_ids=(fourth,)))
    deltas = run(engine)["a", 0]
    assert len(ids(deltas)) == 4
    finish = deltas[-1].finish
    assert finish is not None
    assert (finish.reason, finish.stop_reason) == ("stop", fourth)


def test_preemption_changes_no_output(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG, num_blocks=12)
    for i in range(8):
        engine.add(request(f"r{i}", [1] * (10 + i), max_tokens=60, seed=i))
    outputs = run(engine)
    assert engine.stats().preemptions > 0
    for i in range(8):
        assert ids(outputs[f"r{i}", 0]) == expected(engine, i, 10 + i, 60)


def test_first_in_first_out(make_engine: MakeEngine) -> None:
    engine = make_engine(replace(CONFIG, max_seqs=1))
    for name in "abc":
        engine.add(request(name, [1] * (50 if name == "a" else 2), max_tokens=3))
    finished = []
    while engine.has_requests:
        finished += [d.request_id for d in engine.step() if d.finish]
    assert finished == ["a", "b", "c"]


def test_paused_requests_keep_their_place(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    engine.add(request("slow", [1, 300]))
    engine.add(request("fast", [1, 301]))
    before = engine.step()
    engine.pause("slow")
    before += engine.step()  # with what was under way
    deltas = [d for _ in range(30) for d in engine.step()]
    assert {d.request_id for d in deltas} == {"fast"}
    engine.resume("slow")
    rest = [d for _ in range(30) for d in engine.step()]
    assert len(rest) == 20 - sum(d.request_id == "slow" for d in before)
    assert rest[-1].finish is not None


def test_abort_frees_at_the_next_step(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    engine.add(request("a", [1] * 40, n=3))
    engine.step()
    engine.step()
    engine.step()
    assert engine.stats().blocks_free < engine.stats().blocks_total
    engine.abort("a")
    deltas = engine.step()
    assert [d.finish.reason for d in deltas if d.finish] == ["abort"] * 3
    assert engine.stats().blocks_free == engine.stats().blocks_total


def test_what_the_engine_refuses(make_engine: MakeEngine) -> None:
    engine = make_engine(replace(CONFIG, max_waiting=2), num_blocks=8)
    with pytest.raises(ContextTooLong, match="128"):
        engine.add(request("a", [1] * 128))
    with pytest.raises(InvalidRequest, match="no tokens"):
        engine.add(request("a", []))
    with pytest.raises(InvalidRequest, match="0 … 511"):
        engine.add(request("a", [512]))
    with pytest.raises(InvalidRequest, match="logit_bias"):
        engine.add(request("a", [1], logit_bias=((512, 1.0),)))
    engine.add(request("a", [1]))
    engine.add(request("b", [1]))
    with pytest.raises(QueueFull) as refused:
        engine.add(request("c", [1]))
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s >= 1


def test_waiting_too_long_is_an_error_of_its_own(make_engine: MakeEngine) -> None:
    engine = make_engine(replace(CONFIG, max_seqs=1, queue_timeout_s=0.0))
    engine.add(request("a", [1]))
    engine._next_expiry_check_s = 1e12
    engine.step()
    engine.add(request("late", [1]))
    engine.step()
    engine._next_expiry_check_s = 0.0
    errors = [d.finish.error for d in engine.step() if d.finish]
    assert [type(e) for e in errors] == [Unavailable]


def test_a_failing_step_ends_what_ran_and_nothing_else(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(replace(CONFIG, max_seqs=2))
    for name in "abc":
        engine.add(request(name, [1]))
    execute = engine.parts.runner.execute
    engine.step()
    monkeypatch.setattr(type(engine.parts.runner), "execute", lambda self, batch: 1 / 0)
    errors = {d.request_id: d.finish.error for d in engine.step() if d.finish}
    assert set(errors) == {"a", "b"}
    assert all(isinstance(e, EngineFailed) for e in errors.values())
    monkeypatch.setattr(engine.parts.runner, "execute", execute, raising=False)
    monkeypatch.undo()
    assert len(ids(run(engine)["c", 0])) == 20
    assert not engine.is_failed


class Broken:
    """A step that the device finds to have failed when somebody waits for it."""

    def wait(self) -> StepResult:
        raise RuntimeError("an illegal memory access was encountered")


def test_what_a_step_failed_to_compute_is_found_by_nobody(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(CONFIG)
    runner = engine.parts.runner
    prompt = [1, *range(260, 300)]
    engine.add(request("a", prompt))
    engine.step()
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(type(runner), "execute", lambda self, batch: Broken())
        failed = [d for _ in range(2) for d in engine.step() if d.finish]
    assert [type(d.finish.error) for d in failed if d.finish] == [EngineFailed]
    assert engine.stats().blocks_free == engine.stats().blocks_total
    engine.add(request("b", prompt))
    finish = run(engine)["b", 0][-1].finish
    assert finish is not None
    assert finish.reason == "length"
    if runner.overlaps:
        assert finish.usage.cached_tokens == 0


def test_three_failures_in_a_row_end_the_engine(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(replace(CONFIG, max_seqs=1))
    for name in "abcde":
        engine.add(request(name, [1]))
    monkeypatch.setattr(type(engine.parts.runner), "execute", lambda self, batch: 1 / 0)
    assert len(run(engine)) == 5
    assert engine.is_failed
    with pytest.raises(Unavailable):
        engine.add(request("f", [1]))


def test_the_engines_own_thread(make_engine: MakeEngine) -> None:
    """Chunks of a prompt bring no delta: the thread must go on all the same, and sleep once there is nothing to do."""
    engine = make_engine(CONFIG)
    ended: Queue[str] = Queue()
    engine._on_deltas = lambda deltas: [ended.put(d.request_id) for d in deltas if d.finish] and None
    engine.start()
    for round_number in range(3):
        names = {f"r{round_number}-{i}" for i in range(6)}
        for i, name in enumerate(sorted(names)):
            engine.add(request(name, [1] * (100 + i), max_tokens=3))
        assert {ended.get(timeout=10) for _ in names} == names
        steps = engine.stats().steps
        time.sleep(0.05)
        assert engine.stats().steps == steps
    engine.add(request("last", [1] * 10, max_tokens=400))
    engine.stop()
    assert ended.get(timeout=10) == "last"


class EngineMachine(RuleBasedStateMachine):
    """Random adds, choices, aborts, pauses and forced preemptions on a small pool; outputs and ledger stay right."""

    make: MakeEngine
    config: EngineConfig = CONFIG

    @initialize(
        num_blocks=st.integers(8, 24),
        prefix_cache_n=st.sampled_from([0, 2, 100]),
        windows=st.sampled_from([(0,), (1,), (17,), (40,), (0, 20), (9, 0, 33)]),
    )
    def start(self, num_blocks: int, prefix_cache_n: int, windows: tuple[int, ...]) -> None:
        config = replace(self.config, prefix_cache_n=prefix_cache_n)
        self.engine = self.make(config, max_seq_len=384, num_blocks=num_blocks, windows=windows)
        self.limit = min(384, self.engine.parts.factory.pool_tokens) - 1
        self.sent: dict[str, GenerateRequest] = {}
        self.output: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.ended: dict[tuple[str, int], str] = {}

    @rule(length=st.integers(1, 120), n=st.integers(1, 4), max_tokens=st.integers(1, 60), shared=st.booleans())
    def add(self, length: int, n: int, max_tokens: int, shared: bool) -> None:
        name = f"r{len(self.sent)}"
        fill = 300 if shared else 260 + len(self.sent) % 40
        sent = request(
            name, [1] + [fill] * (min(length, self.limit) - 1), n=n, max_tokens=max_tokens, seed=len(self.sent)
        )
        try:
            self.engine.add(sent)
        except QueueFull:
            return
        self.sent[name] = sent

    @rule(pick=st.randoms(use_true_random=False), what=st.sampled_from(["abort", "pause", "resume"]))
    def disturb(self, pick: random.Random, what: str) -> None:
        if self.sent:
            getattr(self.engine, what)(pick.choice(list(self.sent)))

    @rule(pick=st.randoms(use_true_random=False))
    def preempt(self, pick: random.Random) -> None:
        if self.engine.parts.scheduler.running:
            self.engine.parts.scheduler.preempt(pick.choice(self.engine.parts.scheduler.running))

    @rule(count=st.integers(1, 20))
    def step(self, count: int) -> None:
        for _ in range(count):
            for delta in self.engine.step():
                key = delta.request_id, delta.choice
                assert key not in self.ended
                self.output[key] += delta.token_ids
                if delta.finish:
                    self.ended[key] = delta.finish.reason

    @invariant()
    def ledger_is_sound(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.parts.scheduler.pool.check()
        scheduler = self.engine.parts.scheduler
        rows = [r.row for r in scheduler.running]
        assert len(set(rows)) == len(rows)
        for r in scheduler.running:
            assert r.num_computed < r.num_tokens
            for window, table, given_up in zip(scheduler.tables._windows, r.tables, r.num_given_up, strict=True):
                assert r.num_computed <= len(table) * 16
                assert table.count(NO_BLOCK) == given_up == len(table) - len([b for b in table[given_up:] if b >= 0])
                assert given_up <= window.first_block(r.num_computed)
                assert len(table) - given_up <= window.most_blocks(r.num_tokens)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for name in self.sent:
            self.engine.resume(name)
        for _ in range(20_000):
            if not self.engine.has_requests:
                break
            self.step(1)
        assert not self.engine.has_requests
        for (name, choice), reason in self.ended.items():
            sent = self.sent[name]
            output = self.output[name, choice]
            if reason == "abort":
                continue
            assert reason == "length"
            room = self.limit + 1 - len(sent.prompt_ids)
            assert len(output) == min(sent.sampling.max_tokens or 0, room)
            if choice == 0:
                assert output == expected(self.engine, sent.sampling.seed or 0, len(sent.prompt_ids), len(output))
        assert len(self.ended) == sum(sent.sampling.n for sent in self.sent.values())
        self.engine.parts.scheduler.pool.check()


def machine_test(make_engine: MakeEngine, max_examples: int) -> None:
    class Machine(EngineMachine):
        make = staticmethod(make_engine)

    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=max_examples, stateful_step_count=50, suppress_health_check=quiet),
    )


def test_random_operations(make_engine: MakeEngine) -> None:
    machine_test(make_engine, max_examples=40)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_random_operations_for_long(make_engine: MakeEngine) -> None:
    machine_test(make_engine, max_examples=600)
