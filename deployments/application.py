"""The application on a running Serve: deploy it, see how it fares, end its streams."""

import asyncio
import enum
import logging
import re
from dataclasses import dataclass

from ray import serve
from ray.serve.schema import ApplicationStatus

from deployments.actor_options import INGRESS

log = logging.getLogger(__name__)

APPLICATION = "sirocco"

# How a sentence of ours looks inside the traceback of a failed constructor.
_SENTENCE = re.compile(r"(?:serve_app\.errors\.)?(ModelFileError|LaunchError)(?:\(.*?\))?: (.+)")


class State(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the application is. message says what failed; is_our_sentence: it is one of ours, not a traceback."""

    state: State
    message: str = ""
    is_our_sentence: bool = False


def deploy(application: serve.Application) -> None:
    """Gives the application to Serve and does not wait for it."""
    target = serve.RunTarget(application, name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def progress() -> Progress:
    """Asks the controller."""
    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return Progress(State.STARTING)
    messages = [application.message, *(d.message for d in application.deployments.values())]
    text = "\n".join(message for message in messages if message)
    if application.status == ApplicationStatus.RUNNING:
        return Progress(State.RUNNING)
    if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
        found = _SENTENCE.search(text)
        return Progress(State.FAILED, found[2].strip() if found else text, found is not None)
    return Progress(State.STARTING)


def end_streams(timeout_s: float) -> None:
    """Has every ingress replica tell its clients that the server ends."""

    async def broadcast() -> None:
        # With the throughput switch a handle wants a running loop, here too.
        handle = serve.get_deployment_handle(INGRESS, APPLICATION)
        await handle.broadcast("end_streams", timeout_s).results_async(timeout_s=timeout_s + 1, return_exceptions=True)

    asyncio.run(broadcast())
