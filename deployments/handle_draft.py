"""A draft replica through Serve's handle."""

from collections.abc import Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.remote_proposer import DraftOffer, DraftReplica
from serve_app.engine.speculation.draft_call import DraftCall, Drafted


class HandleDraft(DraftReplica):
    """See DraftReplica. With one replica; of several each call would find another one."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def open_channel(self, digest: bytes) -> DraftOffer:
        offer: DraftOffer = await self._handle.open_channel.remote(digest)
        return offer

    async def propose(
        self, client: str, calls: Sequence[DraftCall], ended: Sequence[int], limit_s: float
    ) -> list[Drafted]:
        drafted: list[Drafted] = await self._handle.propose.remote(client, calls, ended, limit_s)
        return drafted
