"""Requests through backend, pump and target: the good way, and every other."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from deployments import serve_backend
from deployments.serve_backend import ServeBackend
from serve_app.errors import ContextTooLong, EngineFailed, QueueFull, Unavailable
from serve_app.messages import PromptInput
from serve_app.metrics import HttpMetrics
from tests.deployments.fakes import CollectingSink, words


def prompt(name: str, *, max_tokens: int = 20, n: int = 1) -> PromptInput:
    return PromptInput(name, prompt=[1, 2, 3], sampling={"max_tokens": max_tokens, "n": n})


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def is_quiet(stack) -> None:
    """Nothing of any request is left anywhere."""
    await until(lambda: stack.engine.stats().num_running == 0)
    await until(lambda: not stack.backend._last_calls)
    assert stack.backend.num_running == 0
    assert stack.receiver.num_requests == 0
    assert not stack.target._sender._requests
    assert not stack.target._handle_streams._queues


async def test_many_requests_at_once_get_their_own_tokens(stack):
    sinks = [CollectingSink() for _ in range(40)]
    await asyncio.gather(
        *(stack.backend.generate(prompt(f"r{i}", max_tokens=5 + i, n=1 + i % 3), s) for i, s in enumerate(sinks))
    )
    for i, sink in enumerate(sinks):
        assert sink.started.prompt_tokens == 3
        for choice in range(1 + i % 3):
            assert sink.text(choice) == words(5 + i)
    assert not stack.engine.aborted
    await is_quiet(stack)


async def test_cancelling_aborts_in_the_engine(stack):
    sink = CollectingSink()
    task = asyncio.create_task(stack.backend.generate(prompt("r", max_tokens=10**6), sink))
    await until(lambda: len(sink.deltas) > 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: stack.engine.aborted == ["r"])
    await is_quiet(stack)


async def test_what_the_engine_refuses_reaches_the_client_as_it_is(stack):
    for error in (ContextTooLong("too long", param="prompt"), QueueFull("full", retry_after_s=7)):
        stack.engine.refusal = error
        with pytest.raises(type(error)) as caught:
            await stack.backend.generate(prompt("r"), CollectingSink())
        assert (caught.value.param, caught.value.retry_after_s) == (error.param, error.retry_after_s)
        await is_quiet(stack)


async def test_a_failure_in_the_engine_reaches_the_client(stack):
    sink = CollectingSink()
    task = asyncio.create_task(stack.backend.generate(prompt("r", max_tokens=10**6), sink))
    await until(lambda: sink.deltas)
    stack.engine.failure = EngineFailed("the engine failed in a step")
    with pytest.raises(EngineFailed, match="in a step"):
        await task
    await is_quiet(stack)


async def test_a_lost_replica_is_replaced_before_the_first_token_only(stack):
    stack.replicas.errors = [ActorDiedError()]
    sink = CollectingSink()
    await stack.backend.generate(prompt("r"), sink)
    assert sink.text() == words(20)
    assert stack.replicas.calls == 2
    stack.replicas.errors = [ActorDiedError(), ActorDiedError()]
    with pytest.raises(Unavailable) as caught:
        await stack.backend.generate(prompt("s"), CollectingSink())
    assert caught.value.retry_after_s is not None
    await is_quiet(stack)


async def test_a_replica_lost_in_the_middle_is_an_error(stack, monkeypatch):
    real = stack.target.generate

    async def dies(request):
        call = asyncio.ensure_future(real(request))
        await asyncio.sleep(0.05)
        call.cancel()
        raise ActorDiedError

    monkeypatch.setattr(stack.target, "generate", dies)
    sink = CollectingSink()
    with pytest.raises(EngineFailed, match="lost"):
        await stack.backend.generate(prompt("r", max_tokens=10**6), sink)
    assert sink.deltas
    await is_quiet(stack)


async def test_backpressure_becomes_429_with_the_engines_estimate(stack):
    await stack.backend.health()
    stack.replicas.errors = [BackPressureError(5, 5)]
    with pytest.raises(QueueFull) as caught:
        await stack.backend.generate(prompt("r"), CollectingSink())
    assert caught.value.retry_after_s == 3.0


async def test_more_requests_than_may_be_open_are_refused(stack):
    tasks = [
        asyncio.create_task(stack.backend.generate(prompt(f"r{i}", max_tokens=10**6), CollectingSink()))
        for i in range(50)
    ]
    await until(lambda: stack.backend.num_running == 50)
    with pytest.raises(QueueFull):
        await stack.backend.generate(prompt("one more"), CollectingSink())
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await is_quiet(stack)


async def test_tokens_that_never_come_are_an_error(stack, monkeypatch):
    monkeypatch.setattr(serve_backend, "LAST_TOKENS_S", 0.05)

    async def silent(request):
        return []

    monkeypatch.setattr(stack.target, "generate", silent)
    with pytest.raises(EngineFailed, match="last tokens"):
        await stack.backend.generate(prompt("r"), CollectingSink())


async def test_stopping_tells_every_client(stack):
    tasks = [
        asyncio.create_task(stack.backend.generate(prompt(f"r{i}", max_tokens=10**6), CollectingSink()))
        for i in range(5)
    ]
    await until(lambda: stack.engine.stats().num_running == 5)
    stack.backend.stop()
    for task in tasks:
        with pytest.raises(Unavailable, match="shutting down"):
            await task
    with pytest.raises(Unavailable, match="shutting down"):
        await stack.backend.generate(prompt("late"), CollectingSink())
    assert not (await stack.backend.health()).is_ready
    await is_quiet(stack)


async def test_before_the_first_target_is_there_requests_are_refused(stack, monkeypatch):
    monkeypatch.setattr(serve_backend, "STATUS_TIMEOUT_S", 0.05)
    stack.replicas.is_target_there = False
    health = await stack.backend.health()
    assert (health.is_ready, "loading" in health.reason) == (False, True)
    with pytest.raises(Unavailable, match="loading") as caught:
        await stack.backend.generate(prompt("r"), CollectingSink())
    assert caught.value.retry_after_s == serve_backend.LOADING_RETRY_S


async def test_health_follows_the_target(stack, monkeypatch):
    monkeypatch.setattr(serve_backend, "STATUS_AGE_S", 0.0)
    assert (await stack.backend.health()).is_ready
    stack.engine.is_failed = True
    health = await stack.backend.health()
    assert (health.is_ready, "No target" in health.reason) == (False, True)


async def test_metrics_are_summed_and_survive_a_missing_target(stack, monkeypatch):
    text = (await stack.backend.metrics()).decode()
    assert "sirocco_targets 1.0" in text
    assert "sirocco_kv_blocks_total 100.0" in text

    async def fails():
        raise ActorDiedError

    monkeypatch.setattr(stack.replicas, "snapshots", fails)
    assert "sirocco_targets 0.0" in (await stack.backend.metrics()).decode()


async def test_the_model_is_asked_for_once(stack):
    (card,) = await stack.backend.models()
    assert (card.id, card.max_model_len) == ("fake", 128)


async def test_handle_streams_do_the_same_without_a_pump(stack):
    backend = ServeBackend(stack.replicas, None, HttpMetrics())
    sink = CollectingSink()
    await backend.generate(prompt("r", n=2), sink)
    assert (sink.text(0), sink.text(1)) == (words(20), words(20))
    sink = CollectingSink()
    task = asyncio.create_task(backend.generate(prompt("s", max_tokens=10**6), sink))
    await until(lambda: sink.deltas)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: stack.engine.aborted == ["s"])
    task = asyncio.create_task(backend.generate(prompt("t", max_tokens=10**6), CollectingSink()))
    await until(lambda: backend.num_running == 1)
    backend.stop()
    with pytest.raises(Unavailable):
        await task
    await is_quiet(stack)
