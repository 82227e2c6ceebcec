"""What a call to a replica may raise → the ServeError that the client is shown."""

import logging

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
    RequestCancelledError,
)

from serve_app.errors import EngineFailed, QueueFull, ServeError, Unavailable

log = logging.getLogger(__name__)

# Serve replaces a dead replica in two to five seconds.
RESTART_S = 5.0


class ReplicaLost(Unavailable):
    """The replica died or cannot be reached; another one may do the same work."""


def to_serve_error(error: BaseException, *, retry_after_s: float) -> ServeError:
    """The error for the client. retry_after_s: the engine's estimate of the wait, for a full queue."""
    if isinstance(error, RayTaskError):
        error = error.cause if isinstance(error.cause, BaseException) else error
    if isinstance(error, ServeError):
        return error
    if isinstance(error, BackPressureError):
        return QueueFull("Too many requests are waiting.", retry_after_s=retry_after_s)
    if isinstance(error, RayActorError | WorkerCrashedError | ReplicaUnavailableError):
        return ReplicaLost("The replica that worked on the request is lost.", retry_after_s=RESTART_S)
    if isinstance(error, DeploymentUnavailableError):
        return Unavailable("A part of the application cannot be deployed.", retry_after_s=RESTART_S)
    if isinstance(error, TaskCancelledError | RequestCancelledError):
        return Unavailable("The replica is shutting down.", retry_after_s=RESTART_S)
    if isinstance(error, TimeoutError):
        return Unavailable("The replica did not answer in time.", retry_after_s=retry_after_s)
    log.error("a call to a replica failed", exc_info=error)
    if isinstance(error, RayError | RayServeException):
        return ReplicaLost("The replica could not be reached.", retry_after_s=RESTART_S)
    return EngineFailed("The request failed inside the server.")
