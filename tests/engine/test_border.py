"""What is done between two steps, on an engine without a model."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from serve_app.engine.engine import Engine
from serve_app.messages import GenerateRequest
from serve_app.options import EngineConfig, SamplingParams

CONFIG = EngineConfig(max_seqs=2, block_size=16, queue_timeout_s=100.0)
MakeEngine = Callable[..., Engine]


# An engine whose steps overlap says one step later what one that does not says at once: engine.step() or engine.step().


def add(engine: Engine, name: str, max_tokens: int = 5) -> None:
    engine.add(GenerateRequest(name, [1, 300], SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1)))


def test_actions_run_in_order_and_errors_are_their_owners(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    ran: list[int] = []
    first = engine.border.post(lambda: ran.append(1), drains=False)
    broken = engine.border.post(lambda: ran.append(1 // 0), drains=False)
    last = engine.border.post(lambda: ran.append(3), drains=False)
    assert engine.border.is_due
    add(engine, "a")
    assert engine.step() or engine.step()
    assert ran == [1, 3]
    assert first.result(0) is last.result(0) is None
    with pytest.raises(ZeroDivisionError):
        broken.result(0)
    assert not engine.border.is_due


def test_held_requests_neither_run_nor_expire_nor_age(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_app.engine import border, scheduler
    from serve_app.engine import engine as engine_module

    clock = [1000.0]
    engine = make_engine(replace(CONFIG, max_seqs=1))
    for module in (border, engine_module, scheduler):
        monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    add(engine, "a", max_tokens=3)
    engine.step()
    drained = engine.border.post(lambda: None, drains=True, holds_after=True)
    engine.step()
    clock[0] += 60.0
    add(engine, "b")
    clock[0] += 900.0
    said = [delta.request_id for _ in range(6) for delta in engine.step()]
    assert set(said) == {"a"}
    assert drained.done()
    assert engine.stats().num_waiting == 1
    engine.border.post(lambda: None, drains=False)
    deltas = engine.step() or engine.step()
    assert [delta.request_id for delta in deltas] == ["b"]
    assert not any(delta.finish for delta in deltas)


def test_a_failed_action_holds_on_where_it_was_held(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    engine.border.post(lambda: None, drains=True, holds_after=True)
    add(engine, "a")
    engine.border.post(lambda: 1 // 0, drains=False)  # type: ignore[arg-type, return-value]
    assert not [delta for _ in range(3) for delta in engine.step()]
    done = engine.border.post(lambda: None, drains=True)
    assert engine.step() or engine.step()
    assert done.done()


def test_a_withdrawn_drain_lets_go(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    add(engine, "long", max_tokens=50)
    engine.step()
    done = engine.border.post(lambda: pytest.fail("it was withdrawn"), drains=True)
    add(engine, "new")
    assert {delta.request_id for _ in range(3) for delta in engine.step()} == {"long"}
    assert engine.border.withdraw(done)
    assert not engine.border.withdraw(done)
    assert {delta.request_id for _ in range(3) for delta in engine.step()} == {"long", "new"}
    assert done.cancelled()


def test_what_is_posted_late_waits_for_the_step_under_way(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(CONFIG)
    add(engine, "a")
    engine.step()
    under_way: list[int] = []
    border, look = engine.border, engine.border.may_be_crossed

    def look_too_early() -> bool:
        seen = look()
        border.post(lambda: under_way.append(len(engine._under_way)), drains=False)
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(border, "may_be_crossed", look_too_early)
        engine.step()
        assert not under_way
    engine.step()
    assert under_way == [0]


def test_steps_overlap_while_requests_end(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    add(engine, "a", max_tokens=9)
    engine.step()
    done = engine.border.post(lambda: None, drains=True)
    add(engine, "b")
    engine.step()
    assert len(engine._under_way) == engine.parts.runner.overlaps
    assert engine.stats().num_waiting == 1
    while engine.has_requests:
        engine.step()
    assert done.done()
