"""The replica that owns a draft model: answers the targets of its node by packets, and all others by calls."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray import serve

from deployments.actor_options import DRAFT
from deployments.draft_channel import DraftThread
from deployments.draft_plan import DraftPlan, draft_plan
from deployments.remote_proposer import DraftOffer
from deployments.replica_process import Surroundings, prepare_process
from deployments.replica_switch import ReplicaSwitch, SwitchCommand
from deployments.switch_part import NO_WISH, PartState, Wish, wished_source
from deployments.wish_call import latest_wish
from serve_app.config import AppConfig
from serve_app.engine.speculation.draft_border import MakeSwitch
from serve_app.engine.speculation.draft_call import DraftCall, Drafted, DraftModel
from serve_app.engine.stats import DraftStats
from serve_app.errors import EngineFailed
from serve_app.loaders.model_files import resolve
from serve_app.metrics import Snapshot, draft_snapshot, process_snapshot
from serve_app.text.vocabulary_digest import vocabulary_digest

if TYPE_CHECKING:
    from serve_app.engine.speculation.build_draft import BuiltDraft

log = logging.getLogger(__name__)


class DraftServer:
    """A draft model on a thread of its own, and this event loop, which never touches torch."""

    def __init__(
        self,
        model: DraftModel,
        vocabulary: Sequence[bytes],
        node_id: str,
        *,
        directory: str | None = None,
        maps_text: bool = False,
        make_switch: MakeSwitch | None = None,
        stats: Callable[[], DraftStats] | None = None,
        replica_id: str = "draft",
        wish: Wish = NO_WISH,
        spins: bool = False,
    ) -> None:
        """Owns the model. vocabulary: what the draft's ids mean. directory: for the socket, see DraftThread.
        make_switch: None where the weights cannot be changed. stats: what the model has done. wish: the type that it
        was loaded for. spins: see Waiting."""
        self._vocabulary = list(vocabulary)
        self._digest = vocabulary_digest(vocabulary)
        self._node_id = node_id
        self._maps_text = maps_text
        self._stats = stats
        self._thread = DraftThread(model, directory, spins=spins)
        # One that is alone sees every job from its beginning.
        switch = None if make_switch is None else make_switch(self._thread)
        self._switch = ReplicaSwitch(switch, replica_id, node_id, wish)
        self._is_stopped = False
        self._thread.start()

    async def open_channel(self, digest: bytes) -> DraftOffer:
        """See DraftReplica."""
        vocabulary = None if digest == self._digest else self._vocabulary
        return DraftOffer(self._node_id, self._thread.path, os.getpid(), vocabulary, self._maps_text)

    async def propose(
        self, client: str, calls: Sequence[DraftCall], ended: Sequence[int], limit_s: float
    ) -> list[Drafted]:
        """One call a step for all of a target's requests; see DraftReplica."""
        return await asyncio.wrap_future(self._thread.call(client, calls, ended, limit_s))

    async def snapshot(self) -> Snapshot:
        """This draft's metrics."""
        weights: Snapshot = {"sirocco_draft_isq_info": {self._switch.isq_type: [1.0]}}
        model = {} if self._stats is None else draft_snapshot(self._stats())
        return model | process_snapshot(DRAFT) | weights

    async def re_isq(self, command: SwitchCommand, *args: Any) -> PartState:
        """A command of ReplicaSwitch."""
        return await self._switch.run(command, *args)

    async def isq_wish(self) -> Wish:
        """The type of weights that the draft is to have, as far as it knows."""
        return self._switch.wish

    async def check_health(self) -> None:
        """Serve asks this every few seconds and replaces the replica when it raises."""
        if self._thread.is_failed:
            raise EngineFailed("The draft model fails in every step.")

    def stop(self) -> None:
        """Ends the channels, and frees model and cache."""
        if not self._is_stopped:
            self._is_stopped = True
            self._switch.stop()
            self._thread.stop()


def build_model(plan: DraftPlan) -> "BuiltDraft":
    """The draft model of a plan. Imports torch. Raises as build_draft does."""
    # Imported here: the driver and the targets read this module too, which need nothing of it.
    from serve_app.engine.speculation.build_draft import build_draft

    source, target = resolve(plan.source), resolve(plan.target)
    return build_draft(source, target, plan.engine, maps_text=plan.maps_text, works_ahead=plan.works_ahead)


@serve.deployment(name=DRAFT)
class Draft(DraftServer):
    """DraftServer as a Serve replica."""

    # Serve waits for a constructor that is a coroutine.
    async def __init__(self, config: AppConfig, surroundings: Surroundings) -> None:  # type: ignore[misc]
        import ray

        prepare_process(config, surroundings)
        started_s = time.monotonic()
        plan = draft_plan(config, is_private=surroundings.is_private)
        wish = await latest_wish("draft")
        built = build_model(replace(plan, source=wished_source(plan.source, wish)))
        super().__init__(
            built.model,
            built.vocabulary,
            ray.get_runtime_context().get_node_id(),
            directory=surroundings.directory,
            maps_text=plan.maps_text,
            make_switch=built.make_switch,
            stats=built.stats,
            replica_id=serve.get_replica_context().replica_id.unique_id,
            wish=wish,
            spins=plan.spins,
        )
        log.info("the draft model is ready after %.1f s", time.monotonic() - started_s)

    def __del__(self) -> None:
        # Serve calls this when it stops the replica; after a failed constructor there is nothing to stop.
        if hasattr(self, "_is_stopped"):
            self.stop()
