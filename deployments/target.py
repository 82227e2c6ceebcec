"""The replica that owns an engine: takes requests by calls that stay open, sends their tokens through the pump."""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.actor_options import TARGET, draft_has_cores, target_engine
from deployments.handle_draft import HandleDraft
from deployments.handle_stream import HandleStreams
from deployments.pump_sender import TokenSender
from deployments.remote_proposer import DraftReplica, RemoteProposer
from deployments.replica_process import Surroundings, prepare_process
from deployments.replica_switch import AskWish, ReplicaSwitch, SwitchCommand
from deployments.switch_part import NO_WISH, PartState, Wish, wished_source
from deployments.wish_call import latest_wish
from serve_app.config import AppConfig
from serve_app.engine.speculation.proposer import Proposer
from serve_app.engine.speculation.report import SpeculationReport
from serve_app.engine.stats import EngineStats
from serve_app.engine.weight_switch import WeightSwitch
from serve_app.errors import EngineFailed
from serve_app.loaders.model_files import resolve
from serve_app.messages import Finish, GenerateRequest, TokenDelta
from serve_app.metrics import Snapshot, engine_snapshot, exchange_snapshot, process_snapshot
from serve_app.options import EngineConfig, ModelSource, SpeculationOptions
from serve_app.text.tokenizer import open_tokenizer
from serve_app.text.vocabulary_digest import vocabulary_of

log = logging.getLogger(__name__)

# A thread that returns from torch to Python waits this long for another one, not Python's 5 ms.
SWITCH_INTERVAL_S = 0.0005


class EngineLike(Protocol):
    """What the replica asks of serve_app.engine.engine.Engine. All of it may be called from any thread."""

    def add(self, source: GenerateRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def pause(self, request_id: str) -> None: ...
    def resume(self, request_id: str) -> None: ...
    def speculate(self, options: SpeculationOptions, draft: Proposer | None = None) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def stats(self) -> EngineStats: ...
    @property
    def switch(self) -> WeightSwitch | None: ...


EngineBuilder = Callable[[ModelSource, EngineConfig, Callable[[list[TokenDelta]], None]], EngineLike]


@dataclass(frozen=True, slots=True)
class TargetStatus:
    """A target as an ingress sees it."""

    is_ready: bool
    estimated_wait_s: float
    num_running: int
    num_waiting: int
    blocks_total: int
    blocks_free: int


class TargetServer:
    """One engine on its own thread, and this event loop, which never touches torch.

    The constructor loads the model, and raises ModelFileError when it cannot: Serve sends no requests before.
    """

    def __init__(
        self,
        config: AppConfig,
        replica_id: str,
        node_id: str,
        build_engine: EngineBuilder | None = None,
        *,
        is_private: bool = False,
        wish: Wish = NO_WISH,
        ask_wish: AskWish | None = None,
        draft: DraftReplica | None = None,
    ) -> None:
        """is_private: on a cluster of this machine alone, whose cores the targets divide. wish: the type of the weights
        that the targets serve by now; ask_wish: see ReplicaSwitch. draft: who drafts for this target."""
        loop = asyncio.get_running_loop()
        started_s = time.monotonic()
        build = build_engine or _engine_builder()
        engine_config = target_engine(config, is_private=is_private)
        self._engine = build(wished_source(config.model.to_source(), wish), engine_config, self._publish)
        pause, resume = self._engine.pause, self._engine.resume
        self._sender = TokenSender(replica_id, node_id, loop, pause=pause, resume=resume)
        self._handle_streams = HandleStreams(loop, pause=pause, resume=resume)
        self.draft = None if draft is None else _remote_proposer(config, replica_id, node_id, draft, is_private)
        self._engine.speculate(config.speculation.to_options(), self.draft)
        self._switch = ReplicaSwitch(self._engine.switch, replica_id, node_id, wish, ask_wish)
        if ask_wish is not None:
            self._switch.keep_catching_up()
        self._report: asyncio.Task[None] | None = None
        if config.speculation.to_options().use != "off":
            report = SpeculationReport(lambda: self._engine.stats().speculation)
            self._report = loop.create_task(report.run())
        self._is_stopped = False
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._engine.start()
        log.info("the engine is ready after %.1f s", time.monotonic() - started_s)

    async def generate(self, request: GenerateRequest) -> list[Finish]:
        """Runs a request to its end while its tokens go to request.stream_to; returns one Finish per choice.

        Raises ServeError. Cancelling the call aborts the request.
        """
        assert request.stream_to is not None
        request_id = request.request_id
        finished = self._sender.open(request_id, request.stream_to, request.sampling.n)
        is_running = False
        try:
            self._engine.add(request)
            is_running = True
            finishes = await finished
            is_running = False
            return finishes
        finally:
            self._sender.close(request_id)
            if is_running:
                self._engine.abort(request_id)

    async def generate_stream(self, request: GenerateRequest) -> AsyncIterator[list[TokenDelta]]:
        """The same without the pump: yields what each step (or several) brought."""
        request_id = request.request_id
        self._handle_streams.open(request_id)
        is_running = False
        try:
            self._engine.add(request)
            is_running = True
            async for deltas in self._handle_streams.read(request_id, request.sampling.n):
                yield deltas
            is_running = False
        finally:
            self._handle_streams.close(request_id)
            if is_running:
                self._engine.abort(request_id)

    async def status(self) -> TargetStatus:
        """Whether the engine works, and how busy it is."""
        stats = self._engine.stats()
        return TargetStatus(
            not stats.is_failed and not self._is_stopped,
            stats.estimated_wait_s,
            stats.num_running,
            stats.num_waiting,
            stats.blocks_total,
            stats.blocks_free,
        )

    async def snapshot(self) -> Snapshot:
        """This engine's metrics."""
        weights: Snapshot = {"sirocco_isq_info": {self._switch.isq_type: [1.0]}}
        snapshot = engine_snapshot(self._engine.stats()) | process_snapshot(TARGET) | weights
        if self.draft is not None:
            counts = self.draft.counts
            snapshot |= exchange_snapshot("exchange", counts.exchanges.counts, counts.exchanges.total_s)
            snapshot |= exchange_snapshot("messaging", counts.messaging.counts, counts.messaging.total_s)
        return snapshot

    async def re_isq(self, command: SwitchCommand, *args: Any) -> PartState:
        """A command of ReplicaSwitch."""
        return await self._switch.run(command, *args)

    async def isq_wish(self) -> Wish:
        """The type of weights that targets are to serve, as far as this one knows."""
        return self._switch.wish

    async def check_health(self) -> None:
        """Serve asks this every few seconds and replaces the replica when it raises."""
        if self._engine.stats().is_failed:
            raise EngineFailed("The engine fails in every step.")

    def stop(self) -> None:
        """Ends all requests with an error, and frees model and cache."""
        if not self._is_stopped:
            self._is_stopped = True
            if self._report is not None:
                self._report.cancel()
            self._switch.stop()
            self._engine.stop()
            if self.draft is not None:
                self.draft.close()
            self._sender.stop()

    def _publish(self, deltas: list[TokenDelta]) -> None:
        self._sender.publish(deltas)
        self._handle_streams.publish(deltas)


def _remote_proposer(
    config: AppConfig, replica_id: str, node_id: str, draft: DraftReplica, is_private: bool
) -> RemoteProposer:
    tokenizer = open_tokenizer(resolve(config.model.to_source()).tokenizer_source, encodes=False)
    deadline_s = config.speculation.deadline_ms / 1000
    spins = draft_has_cores(config, is_private=is_private)
    return RemoteProposer(draft, replica_id, node_id, vocabulary_of(tokenizer), deadline_s, spins=spins)


def _engine_builder() -> EngineBuilder:
    # Imported here: the module is read by the driver and the ingress too, which need nothing of it.
    from serve_app.engine.start import start_engine

    return start_engine


@serve.deployment(name=TARGET)
class Target(TargetServer):
    """TargetServer as a Serve replica."""

    # Serve waits for a constructor that is a coroutine.
    async def __init__(  # type: ignore[misc]
        self, config: AppConfig, surroundings: Surroundings, draft: DeploymentHandle[Any] | None = None
    ) -> None:
        import ray

        prepare_process(config, surroundings)
        context = serve.get_replica_context()
        node_id = ray.get_runtime_context().get_node_id()
        wish = await latest_wish("target")
        # One that is alone sees every job from its beginning.
        is_alone = (config.deployment.max_target_replicas or config.deployment.target_replicas) == 1
        super().__init__(
            config,
            context.replica_id.unique_id,
            node_id,
            is_private=surroundings.is_private,
            wish=wish,
            ask_wish=None if is_alone else partial(latest_wish, "target"),
            draft=None if draft is None else HandleDraft(draft),
        )

    def __del__(self) -> None:
        # Serve calls this when it stops the replica; after a failed constructor there is nothing to stop.
        if hasattr(self, "_is_stopped"):
            self.stop()
