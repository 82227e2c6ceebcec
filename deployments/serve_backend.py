"""api.backend.Backend over the other replicas: what the routes of an ingress replica call."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, Protocol

from deployments.actor_options import INGRESS
from deployments.call_errors import ReplicaLost, to_serve_error
from deployments.pump_receiver import IncomingTokens, TokenReceiver
from deployments.requantizer import Requantizer, SwitchCalls
from deployments.switch_part import NO_WISH, PartState, SwitchedGroup, Wish
from deployments.target import TargetStatus
from serve_app.api.backend import DeltaSink, Health, IsqJob, IsqMode, IsqState, ModelCard, Started
from serve_app.errors import EngineFailed, QueueFull, ServeError, Unavailable
from serve_app.messages import Finish, GenerateRequest, PromptInput, TokenDelta
from serve_app.metrics import HttpMetrics, Snapshot, merge_snapshots, process_snapshot, render

log = logging.getLogger(__name__)

# What a target's open call may return ahead of its last tokens before they count as lost.
LAST_TOKENS_S = 5.0
STATUS_TIMEOUT_S = 2.0
STATUS_AGE_S = 1.0
# Told to clients that come while the model loads: nobody knows how long that takes.
LOADING_RETRY_S = 5.0
ATTEMPTS = 2


class Replicas(Protocol):
    """The calls to other replicas. Each raises whatever Ray, Serve or the replica raised."""

    def prepare(self, prompt: PromptInput) -> Awaitable[GenerateRequest]: ...
    def card(self) -> Awaitable[ModelCard]: ...
    def generate(self, request: GenerateRequest) -> Awaitable[list[Finish]]: ...
    def generate_stream(self, request: GenerateRequest) -> AsyncIterator[list[TokenDelta]]: ...
    def target_statuses(self) -> Awaitable[list[TargetStatus]]: ...
    def switch_groups(self) -> Mapping[str, SwitchCalls]:
        """The deployments whose weights can be changed, by the name that clients call them."""

    def other_isq_jobs(self) -> Awaitable[list[IsqJob]]:
        """Those that other ingress replicas lead."""

    def snapshots(self) -> Awaitable[list[Snapshot]]:
        """Of all targets, and of the other ingress replicas."""


class ServeBackend:
    """Runs requests over the replicas; made and used on the ingress replica's event loop.

    receiver None: tokens come by one handle stream a request instead of the pump.
    """

    def __init__(
        self, replicas: Replicas, receiver: TokenReceiver | None, metrics: HttpMetrics, *, max_requests: int = 4096
    ) -> None:
        self._replicas = replicas
        self._max_requests = max_requests
        self._receiver = receiver
        self._metrics = metrics
        self._switches = replicas.switch_groups()
        self._requantizer = Requantizer(self._switches, metrics)
        self._card: ModelCard | None = None
        self._started_s = time.monotonic()
        self._is_stopping = False
        self._statuses: list[TargetStatus] = []
        self._statuses_s = -STATUS_AGE_S
        self._was_ready = False
        self._status_check: asyncio.Task[None] | None = None
        self._running: dict[asyncio.Future[None], None] = {}
        self._last_calls: set[asyncio.Future[Any]] = set()

    async def generate(self, prompt: PromptInput, sink: DeltaSink) -> None:
        """Runs one request to its end. Raises ServeError; cancelling it aborts the request at its target."""
        await self._check_ready()
        try:
            request = await self._replicas.prepare(prompt)
        except Exception as error:
            raise self._to_serve_error(error) from error
        sink.begin(Started(len(request.prompt_ids), request.prompt_ids, request.prompt_text))
        stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running[stopped] = None
        try:
            if self._receiver is None:
                await self._through_handle(request, sink, stopped)
            else:
                await self._through_pump(self._receiver, request, sink, stopped)
        finally:
            del self._running[stopped]
            stopped.cancel()

    async def models(self) -> list[ModelCard]:
        """The served model."""
        if self._card is None:
            try:
                self._card = await asyncio.wait_for(self._replicas.card(), STATUS_TIMEOUT_S)
            except Exception as error:
                raise self._to_serve_error(error) from error
        return [self._card]

    async def health(self) -> Health:
        """Asks the targets, at most once a second."""
        if self._is_stopping:
            return Health(False, "The server is shutting down.")
        await self._refresh_statuses()
        if any(status.is_ready for status in self._statuses):
            return Health(True)
        if self._was_ready:
            return Health(False, "No target replica answers; Serve is starting another one.")
        return Health(False, f"The model is loading, for {time.monotonic() - self._started_s:.0f} s by now.")

    async def requantize(self, isq_type: str, mode: IsqMode, target: str) -> IsqJob:
        """See Backend."""
        if self._is_stopping:
            raise _shutting_down()
        return await self._requantizer.begin(isq_type, mode, target)

    async def wait_for_isq(self, job_id: str) -> IsqJob:
        """See Backend."""
        return await self._requantizer.wait(job_id)

    async def isq_state(self) -> IsqState:
        """See Backend."""
        others, answers = await asyncio.gather(
            self._replicas.other_isq_jobs(),
            asyncio.gather(*[calls.each("state", None) for calls in self._switches.values()]),
        )
        types = {
            group: list(dict.fromkeys(state.isq_type for state in found if isinstance(state, PartState)))
            for group, found in zip(self._switches, answers, strict=True)
        }
        jobs = sorted([*self.own_isq_jobs(), *others], key=lambda job: job.created, reverse=True)
        return IsqState(types["target"], jobs, types.get("draft"))

    def own_isq_jobs(self) -> list[IsqJob]:
        """Those that this replica leads or has led, the newest first."""
        return list(self._requantizer.jobs)

    def isq_wish(self, group: SwitchedGroup) -> Wish:
        """Which type the replicas of a group are to serve, as far as this replica knows."""
        return self._requantizer.wishes.get(group, NO_WISH)

    async def metrics(self) -> bytes:
        """All replicas' metrics; those of one that does not answer in time are left out."""
        snapshots: list[Snapshot] = []
        try:
            snapshots = await asyncio.wait_for(self._replicas.snapshots(), STATUS_TIMEOUT_S)
        except Exception as error:
            log.debug("no metrics from the other replicas: %r", error)
        return render(merge_snapshots([self.own_snapshot(), *snapshots]))

    def own_snapshot(self) -> Snapshot:
        """The metrics of this replica."""
        return self._metrics.snapshot() | process_snapshot(INGRESS)

    def stop(self) -> None:
        """Ends every request with an error that its client is told; new ones are refused."""
        self._is_stopping = True
        self._requantizer.stop()
        for stopped in list(self._running):
            if not stopped.done():
                stopped.set_result(None)

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def _through_pump(
        self, receiver: TokenReceiver, request: GenerateRequest, sink: DeltaSink, stopped: asyncio.Future[None]
    ) -> None:
        request.stream_to = receiver.address
        for attempt in range(1, ATTEMPTS + 1):
            stream = receiver.open(request.request_id, sink, request.sampling.n)
            try:
                await self._follow(request, stream, stopped)
                return
            except ReplicaLost as error:
                if stream.num_pushed > 0:
                    raise EngineFailed(
                        "The replica that worked on the request was lost in the middle of it."
                    ) from error
                if attempt == ATTEMPTS:
                    raise
                log.warning("request %s goes to another replica: %s", request.request_id, error.message)
            finally:
                receiver.close(request.request_id)

    async def _follow(self, request: GenerateRequest, stream: IncomingTokens, stopped: asyncio.Future[None]) -> None:
        """Waits for the stream's end, the call's, or ours, whichever comes first."""
        call = asyncio.ensure_future(self._replicas.generate(request))
        try:
            await asyncio.wait((call, stream.finished, stopped), return_when=asyncio.FIRST_COMPLETED)
            if call.done() and not stream.finished.done():
                self._raise_if_failed(call)
                # The call went by another way than the tokens: the last of these may still come.
                await asyncio.wait(
                    (stream.finished, stopped), timeout=LAST_TOKENS_S, return_when=asyncio.FIRST_COMPLETED
                )
            if stream.finished.done():
                stream.finished.result()
                self._let_end(call)
                return
            if stopped.done():
                raise _shutting_down()
            raise EngineFailed("The engine's last tokens were lost.")
        finally:
            if call not in self._last_calls:
                call.cancel()

    def _let_end(self, call: "asyncio.Future[list[Finish]]") -> None:
        """The tokens are all there; the call's own end, on its way, must not be cut off as an abort."""
        self._last_calls.add(call)

        def forget(done: "asyncio.Future[list[Finish]]") -> None:
            self._last_calls.discard(done)
            if not done.cancelled():
                done.exception()

        call.add_done_callback(forget)

    async def _through_handle(self, request: GenerateRequest, sink: DeltaSink, stopped: asyncio.Future[None]) -> None:
        async def copy() -> None:
            async for deltas in self._replicas.generate_stream(request):
                sink.push(deltas)

        copying = asyncio.ensure_future(copy())
        try:
            await asyncio.wait((copying, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not copying.done():
                raise _shutting_down()
            self._raise_if_failed(copying)
        finally:
            copying.cancel()

    def _raise_if_failed(self, call: "asyncio.Future[Any]") -> None:
        if call.cancelled():
            raise ReplicaLost("The replica that worked on the request was stopped.")
        error = call.exception()
        if error is not None:
            raise self._to_serve_error(error) from error

    def _to_serve_error(self, error: BaseException) -> ServeError:
        mapped = to_serve_error(error, retry_after_s=self._estimated_wait_s())
        if isinstance(mapped, ReplicaLost):
            self._statuses_s = -STATUS_AGE_S
        return mapped

    def _estimated_wait_s(self) -> float:
        return min((status.estimated_wait_s for status in self._statuses), default=1.0)

    async def _check_ready(self) -> None:
        """Refuses requests before the first target is there; later ones wait in Serve's queue for a new target."""
        if self._is_stopping:
            raise _shutting_down()
        if len(self._running) >= self._max_requests:
            raise QueueFull(
                f"This server works on {self._max_requests} requests already.", retry_after_s=self._estimated_wait_s()
            )
        if not self._was_ready:
            health = await self.health()
            if not health.is_ready:
                raise Unavailable(health.reason, retry_after_s=LOADING_RETRY_S)

    async def _refresh_statuses(self) -> None:
        if time.monotonic() - self._statuses_s < STATUS_AGE_S:
            return
        # One question for all who ask at the same time; a client that leaves must not end it for the others.
        if self._status_check is None or self._status_check.done():
            self._status_check = asyncio.create_task(self._ask_statuses())
        await asyncio.shield(self._status_check)

    async def _ask_statuses(self) -> None:
        self._statuses = []
        with contextlib.suppress(Exception):  # no answer, in whatever way, is the answer
            self._statuses = await asyncio.wait_for(self._replicas.target_statuses(), STATUS_TIMEOUT_S)
        self._statuses_s = time.monotonic()
        self._was_ready = self._was_ready or any(status.is_ready for status in self._statuses)


def _shutting_down() -> Unavailable:
    return Unavailable("The server is shutting down.")
