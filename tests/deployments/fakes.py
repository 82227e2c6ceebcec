"""An engine without a model, and replicas without Ray."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

from deployments.requantizer import SwitchCalls
from deployments.switch_part import PartState
from deployments.target import TargetStatus
from serve_app.api.backend import IsqJob, ModelCard, Started
from serve_app.engine.speculation.proposer import Proposer
from serve_app.engine.stats import EngineStats
from serve_app.engine.weight_switch import Mode, Progress, SwitchPlan
from serve_app.errors import InvalidRequest, ServeError
from serve_app.messages import Finish, GenerateRequest, PromptInput, TokenDelta, Usage
from serve_app.metrics import Snapshot
from serve_app.options import SamplingParams, SpeculationOptions


class FakeSwitch:
    """A WeightSwitch over nothing. `failures`: what a method raises, once; `gates`: what methods wait for."""

    def __init__(self) -> None:
        self.isq_type = "none"
        self.failures: dict[str, BaseException] = {}
        self.gates = {name: threading.Event() for name in ("plan", "prepare", "switch")}
        for gate in self.gates.values():
            gate.set()
        self.calls: list[str] = []
        self.in_place = False
        self.num_sharing = 0
        self._old: str | None = None
        self._new: str | None = None
        self._is_stopped = threading.Event()

    def _begin(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failures:
            raise self.failures.pop(name)

    def _wait(self, name: str) -> None:
        while not self.gates[name].wait(0.005):
            if self._is_stopped.is_set():
                raise CancelledError

    def plan(self, isq_type: str | int, num_sharing: int = 1) -> SwitchPlan:
        self.num_sharing = num_sharing
        self._begin("plan")
        self.gates["plan"].wait()
        if isq_type == "bogus":
            raise InvalidRequest("There are Q4_0, Q8_0.", param="isq_type")
        return SwitchPlan(str(isq_type), self.isq_type, None, self.in_place, 2, 3, 1)

    def prepare(self, plan: SwitchPlan, progress: Progress) -> None:
        assert self._new is None, "prepared twice"
        self._begin("prepare")
        progress(0.25)
        self._wait("prepare")
        self._new = plan.isq_type
        progress(1.0)

    def switch(self, mode: Mode) -> None:
        assert self._new is not None
        self._begin(f"switch {mode}")
        if "switch" in self.failures:
            self._new = None
            raise self.failures.pop("switch")
        self._wait("switch")
        self._old, self.isq_type, self._new = self.isq_type, self._new, None

    def settle(self) -> None:
        self._begin("settle")
        self._is_stopped.clear()
        self._old = None

    def stop(self) -> None:
        self._is_stopped.set()

    def undo(self) -> None:
        self._begin("undo")
        self._is_stopped.clear()
        if self._old is not None:
            self.isq_type = self._old
        self._old = self._new = None


class FakeEngine:
    """Gives each choice of a request one token a step, on a thread of its own, until max_tokens."""

    def __init__(self, on_deltas: Callable[[list[TokenDelta]], None], *, step_s: float = 0.001) -> None:
        self._on_deltas = on_deltas
        self._step_s = step_s
        self._lock = threading.Lock()
        self._running: dict[str, tuple[GenerateRequest, int]] = {}
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.aborted: list[str] = []
        self.paused: set[str] = set()
        self.refusal: ServeError | None = None
        self.speculation: tuple[SpeculationOptions, Proposer | None] | None = None
        self.failure: ServeError | None = None
        self.is_failed = False
        self.switch = FakeSwitch()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self._thread.join()

    def speculate(self, options: SpeculationOptions, draft: Proposer | None = None) -> None:
        self.speculation = options, draft

    def add(self, source: GenerateRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        with self._lock:
            self._running[source.request_id] = (source, 0)

    def abort(self, request_id: str) -> None:
        with self._lock:
            self._running.pop(request_id, None)
        self.aborted.append(request_id)

    def pause(self, request_id: str) -> None:
        self.paused.add(request_id)

    def resume(self, request_id: str) -> None:
        self.paused.discard(request_id)

    def stats(self) -> EngineStats:
        with self._lock:
            num_running = len(self._running)
        return EngineStats(
            8, num_running, 0, len(self.paused), 100, 100 - num_running, 0, 0, 0, 0, 0, 0, 0, 0, 3.0, self.is_failed
        )

    def _run(self) -> None:
        wake = threading.Event()
        while not self._is_stopping:
            wake.wait(self._step_s)
            deltas = self._step()
            if deltas:
                self._on_deltas(deltas)

    def _step(self) -> list[TokenDelta]:
        deltas = []
        with self._lock:
            for request_id, (source, index) in list(self._running.items()):
                if request_id in self.paused:
                    continue
                is_last = index + 1 == source.sampling.max_tokens
                for choice in range(source.sampling.n):
                    finish = Finish("length", Usage(len(source.prompt_ids), index + 1)) if is_last else None
                    if self.failure is not None:
                        finish = Finish("error", Usage(1, 0), error=self.failure)
                    deltas.append(TokenDelta(request_id, choice, index, [index], f"{index} ", finish=finish))
                if is_last or self.failure is not None:
                    del self._running[request_id]
                else:
                    self._running[request_id] = (source, index + 1)
        return deltas


class CollectingSink:
    """A client that takes everything at once."""

    def __init__(self) -> None:
        self.started: Started | None = None
        self.deltas: list[TokenDelta] = []

    def begin(self, started: Started) -> None:
        self.started = started

    def push(self, deltas: Sequence[TokenDelta]) -> None:
        self.deltas.extend(deltas)

    @property
    def backlog(self) -> int:
        return 0

    def text(self, choice: int = 0) -> str:
        return "".join(d.text for d in self.deltas if d.choice == choice)


def words(num_tokens: int) -> str:
    """What FakeEngine says."""
    return "".join(f"{i} " for i in range(num_tokens))


class FakeReplicas:
    """Calls a target in this process; `errors` are raised, one a call, before the target is asked."""

    def __init__(self, target: "object | None") -> None:
        self.target = target
        self.errors: list[BaseException] = []
        self.calls = 0
        self.is_target_there = True

    async def prepare(self, prompt: PromptInput) -> GenerateRequest:
        assert isinstance(prompt.prompt, list)
        return GenerateRequest(prompt.request_id, prompt.prompt, SamplingParams().with_overrides(prompt.sampling))

    async def card(self) -> ModelCard:
        return ModelCard("fake", 1, 128)

    async def generate(self, request: GenerateRequest) -> list[Finish]:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return await self.target.generate(request)  # type: ignore[union-attr]

    async def generate_stream(self, request: GenerateRequest) -> AsyncIterator[list[TokenDelta]]:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        async for deltas in self.target.generate_stream(request):  # type: ignore[union-attr]
            yield deltas

    def switch_groups(self) -> Mapping[str, SwitchCalls]:
        return {"target": FakeCalls(self)}

    async def other_isq_jobs(self) -> list[IsqJob]:
        return []

    async def target_statuses(self) -> list[TargetStatus]:
        if not self.is_target_there:
            await asyncio.sleep(60)
        return [await self.target.status()]  # type: ignore[union-attr]

    async def snapshots(self) -> list[Snapshot]:
        return [await self.target.snapshot()]  # type: ignore[union-attr]


class FakeCalls(SwitchCalls):
    """Commands for the one target."""

    def __init__(self, replicas: FakeReplicas) -> None:
        self._replicas = replicas

    async def each(self, command: str, *args: Any) -> list[PartState | BaseException]:
        answers = asyncio.gather(self._replicas.target.re_isq(command, *args), return_exceptions=True)  # type: ignore[union-attr]
        return list(await answers)
