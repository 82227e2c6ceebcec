"""What targets and the ingress that has them change their weights tell each other. Plain data."""

from dataclasses import dataclass
from typing import Literal

from serve_app.errors import ServeError

PartStep = Literal["idle", "reserved", "preparing", "prepared", "switching", "switched", "failed"]


@dataclass(frozen=True, slots=True)
class Wish:
    """Which type all targets are to serve since a job, the epoch-th; None: what the configuration says.

    Every target and ingress knows one, and of two the later holds: so a replica that starts learns it from whoever
    lives, and nothing has to be kept anywhere else.
    """

    epoch: int = 0
    isq_type: str | None = None


NO_WISH = Wish()


@dataclass(frozen=True, slots=True)
class PartState:
    """How far one target is. isq_type: of the weights in use; job_id None: it has no part in any job.

    in_place: it can make the new weights only in the place of the old ones. progress: of the preparation, 0 to 1.
    error: why its step is failed.
    """

    replica_id: str
    isq_type: str
    wish: Wish
    job_id: str | None = None
    step: PartStep = "idle"
    wanted_type: str | None = None
    in_place: bool = False
    progress: float = 0.0
    error: ServeError | None = None
