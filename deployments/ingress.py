"""The replica that speaks HTTP: the routes over ServeBackend, and the receiving end of the token path."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.actor_options import INGRESS
from deployments.listener import Listener, bind
from deployments.pump_receiver import TokenReceiver
from deployments.replica_process import Surroundings, prepare_process
from deployments.requantizer import SwitchCalls
from deployments.serve_backend import STATUS_TIMEOUT_S, Replicas, ServeBackend
from deployments.switch_part import PartState, SwitchedGroup, Wish
from deployments.target import TargetStatus
from serve_app.api.backend import Backend, IsqJob, ModelCard
from serve_app.config import AppConfig, HttpConfig
from serve_app.messages import Finish, GenerateRequest, PromptInput, TokenDelta
from serve_app.metrics import HttpMetrics, Snapshot

log = logging.getLogger(__name__)

# Of commands that come back only when something is done: a plan, memory freed, old weights put back.
_SWITCH_TIMEOUTS_S = {"reserve": 30.0, "settle": 60.0, "cancel": 1800.0}

# app.py hands it over: the routes know nothing of Ray, and this package nothing of the routes.
AsgiBuilder = Callable[[Callable[[], Backend], HttpConfig, HttpMetrics], Any]


class HandleReplicas(Replicas):
    """The other replicas through Serve's handles."""

    def __init__(
        self,
        preprocessor: DeploymentHandle[Any],
        target: DeploymentHandle[Any],
        draft: DeploymentHandle[Any] | None,
        num_ingresses: int,
    ) -> None:
        self._preprocessor = preprocessor
        self._target = target
        self._draft = draft
        self._target_stream: Any = target.options(stream=True)
        self._num_ingresses = num_ingresses

    async def prepare(self, prompt: PromptInput) -> GenerateRequest:
        request: GenerateRequest = await self._preprocessor.prepare.remote(prompt)
        return request

    async def card(self) -> ModelCard:
        card: ModelCard = await self._preprocessor.card.remote()
        return card

    async def generate(self, request: GenerateRequest) -> list[Finish]:
        finishes: list[Finish] = await self._target.generate.remote(request)
        return finishes

    async def generate_stream(self, request: GenerateRequest) -> AsyncIterator[list[TokenDelta]]:
        async for deltas in self._target_stream.generate_stream.remote(request):
            yield deltas

    async def target_statuses(self) -> list[TargetStatus]:
        return await _all(self._target, "status")

    def switch_groups(self) -> dict[str, SwitchCalls]:
        groups: dict[str, SwitchCalls] = {"target": HandleSwitch(self._target)}
        if self._draft is not None:
            groups["draft"] = HandleSwitch(self._draft)
        return groups

    async def other_isq_jobs(self) -> list[IsqJob]:
        if self._num_ingresses == 1:
            return []
        context = serve.get_replica_context()
        others = serve.get_deployment_handle(INGRESS, context.app_name)
        lists = await _all(others, "isq_jobs_for", context.replica_id.unique_id)
        return [job for jobs in lists for job in jobs]

    async def snapshots(self) -> list[Snapshot]:
        asked = [_all(self._target, "snapshot"), _all(self._preprocessor, "snapshot")]
        if self._draft is not None:
            asked.append(_all_in_time(self._draft, "snapshot"))
        if self._num_ingresses > 1:
            context = serve.get_replica_context()
            others = serve.get_deployment_handle(INGRESS, context.app_name)
            asked.append(_all(others, "snapshot_for", context.replica_id.unique_id))
        return [snapshot for snapshots in await asyncio.gather(*asked) for snapshot in snapshots]


class HandleSwitch(SwitchCalls):
    """The replicas of a deployment that has a model."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def each(self, command: str, *args: Any) -> list[PartState | BaseException]:
        timeout_s = _SWITCH_TIMEOUTS_S.get(command, STATUS_TIMEOUT_S)
        try:
            calls = self._handle.broadcast("re_isq", command, *args)
            answers: list[PartState | BaseException] = await calls.results_async(
                timeout_s=timeout_s, return_exceptions=True
            )
        except (DeploymentUnavailableError, TimeoutError) as error:
            log.debug("no replica answers to %s: %r", command, error)
            return []
        return answers


async def _all(handle: DeploymentHandle[Any], method: str, *args: Any) -> list[Any]:
    """The answers of all replicas of a deployment; those that fail are left out."""
    answers = await handle.broadcast(method, *args).results_async(timeout_s=STATUS_TIMEOUT_S, return_exceptions=True)
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def _all_in_time(handle: DeploymentHandle[Any], method: str) -> list[Any]:
    """The same of a deployment that may be away, for an answer that does not wait for it; none where it is."""
    try:
        async with asyncio.timeout(STATUS_TIMEOUT_S / 2):
            return await _all(handle, method)
    except (DeploymentUnavailableError, TimeoutError) as error:
        log.debug("%s does not answer to %s: %r", handle.deployment_name, method, error)
        return []


@serve.deployment(name=INGRESS)
@serve.ingress()
class Ingress:
    """The HTTP replica: it listens itself, or Serve's proxy calls its ASGI app, built after the constructor."""

    def __init__(
        self,
        config: AppConfig,
        surroundings: Surroundings,
        build_asgi: AsgiBuilder,
        preprocessor: DeploymentHandle[Any],
        target: DeploymentHandle[Any],
        draft: DeploymentHandle[Any] | None = None,
    ) -> None:
        prepare_process(config, surroundings)
        self._config = config
        self._build_asgi = build_asgi
        self._is_listening = surroundings.is_listening
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._metrics = HttpMetrics()
        self._receiver: TokenReceiver | None = None
        if config.deployment.ingress == "pump":
            self._receiver = TokenReceiver(
                self._replica_id,
                ray.get_runtime_context().get_node_id(),
                asyncio.get_running_loop(),
                parent_directory=surroundings.directory,
                tcp_host=None if surroundings.is_private else _node_address(),
            )
        replicas = HandleReplicas(preprocessor, target, draft, config.deployment.ingress_replicas)
        self._backend = ServeBackend(
            replicas, self._receiver, self._metrics, max_requests=config.deployment.max_ongoing_requests
        )
        self._listener: Listener | None = None

    def __serve_build_asgi_app__(self) -> Any:
        app = self._build_asgi(lambda: self._backend, self._config.http, self._metrics)
        if self._is_listening:
            http = self._config.http
            socket = bind(http.host, http.port, is_shared=self._config.deployment.ingress_replicas > 1)
            self._listener = Listener(app, socket, max_header_bytes=http.max_header_bytes)
        return app

    async def snapshot_for(self, asker: str) -> Snapshot:
        """This replica's metrics; nothing for the replica that asks, it counts its own."""
        return {} if asker == self._replica_id else self._backend.own_snapshot()

    async def isq_jobs_for(self, asker: str) -> list[IsqJob]:
        """The changes of weights that this replica leads or has led; nothing for the replica that asks."""
        return [] if asker == self._replica_id else self._backend.own_isq_jobs()

    async def isq_wish(self, group: SwitchedGroup) -> Wish:
        """The type of weights that the replicas of a group are to serve, as far as this one knows."""
        return self._backend.isq_wish(group)

    async def num_open(self) -> int:
        """Requests that are running for this replica's clients."""
        return self._backend.num_running

    async def end_streams(self, timeout_s: float) -> None:
        """Refuses new requests and ends the open ones with an error that their clients are told."""
        if self._listener is not None:
            self._listener.stop_accepting()
        self._backend.stop()
        if self._listener is not None:
            await self._listener.close(timeout_s)

    def __del__(self) -> None:
        # Serve calls this when it stops the replica; after a failed constructor there is nothing to stop.
        receiver: TokenReceiver | None = getattr(self, "_receiver", None)
        if receiver is not None:
            receiver.stop()


def _node_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
