"""Asks all who may know which type of weights the targets are to serve."""

import asyncio
import logging
import time

from ray import serve

from deployments.actor_options import INGRESS, TARGET
from deployments.switch_part import NO_WISH, Wish

log = logging.getLogger(__name__)

# When a server starts, nobody is there yet to answer.
_TIMEOUT_S = 2.0


async def latest_wish() -> Wish:
    """The latest that any target or ingress replica knows, asked from within a replica."""
    began_s = time.monotonic()
    answers = await asyncio.gather(_ask(TARGET), _ask(INGRESS), return_exceptions=True)
    log.debug("wishes, asked for in %.3f s: %s", time.monotonic() - began_s, answers)
    wishes = [wish for answer in answers if isinstance(answer, list) for wish in answer]
    return max(wishes, key=lambda wish: wish.epoch, default=NO_WISH)


async def _ask(deployment: str) -> list[Wish]:
    handle = serve.get_deployment_handle(deployment, serve.get_replica_context().app_name)
    async with asyncio.timeout(_TIMEOUT_S):
        answers = await handle.broadcast("isq_wish").results_async(timeout_s=_TIMEOUT_S, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, Wish)]
