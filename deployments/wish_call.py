"""Asks all who may know which type of weights a replica that starts is to serve."""

import asyncio
import logging
import time

from ray import serve

from deployments.actor_options import DRAFT, INGRESS, TARGET
from deployments.switch_part import NO_WISH, SwitchedGroup, Wish

log = logging.getLogger(__name__)

# When a server starts, nobody is there yet to answer.
_TIMEOUT_S = 2.0
_DEPLOYMENTS: dict[SwitchedGroup, str] = {"target": TARGET, "draft": DRAFT}


async def latest_wish(group: SwitchedGroup) -> Wish:
    """The latest that any replica of the group or any ingress knows, asked from within a replica."""
    began_s = time.monotonic()
    answers = await asyncio.gather(_ask(_DEPLOYMENTS[group]), _ask(INGRESS, group), return_exceptions=True)
    log.debug("wishes, asked for in %.3f s: %s", time.monotonic() - began_s, answers)
    wishes = [wish for answer in answers if isinstance(answer, list) for wish in answer]
    return max(wishes, key=lambda wish: wish.epoch, default=NO_WISH)


async def _ask(deployment: str, *args: SwitchedGroup) -> list[Wish]:
    handle = serve.get_deployment_handle(deployment, serve.get_replica_context().app_name)
    async with asyncio.timeout(_TIMEOUT_S):
        answers = await handle.broadcast("isq_wish", *args).results_async(timeout_s=_TIMEOUT_S, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, Wish)]
