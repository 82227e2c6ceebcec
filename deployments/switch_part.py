"""What replicas and the ingress that has them change their weights tell each other. Plain data."""

from dataclasses import dataclass, replace
from typing import Literal

from serve_app.errors import ServeError
from serve_app.options import IsqOptions, ModelSource

SwitchedGroup = Literal["target", "draft"]
"""The replicas that serve one model: a job changes the weights of all of them."""

PartStep = Literal["idle", "reserved", "preparing", "prepared", "switching", "switched", "failed"]


@dataclass(frozen=True, slots=True)
class Wish:
    """Which type all replicas of a group are to serve since a job, the epoch-th; None: what the configuration says.

    Every one of them and every ingress knows one, and of two the later holds: so a replica that starts learns it from
    whoever lives, and nothing has to be kept anywhere else.
    """

    epoch: int = 0
    isq_type: str | None = None


NO_WISH = Wish()


@dataclass(frozen=True, slots=True)
class PartState:
    """How far one replica is. isq_type: of the weights in use; job_id None: it has no part in any job. node_id: whose
    memory it shares with other replicas there.

    in_place: it can make the new weights only in the place of the old ones. progress: of the preparation, 0 to 1.
    error: why its step is failed.
    """

    replica_id: str
    node_id: str
    isq_type: str
    wish: Wish
    job_id: str | None = None
    step: PartStep = "idle"
    wanted_type: str | None = None
    in_place: bool = False
    progress: float = 0.0
    error: ServeError | None = None


def wished_source(source: ModelSource, wish: Wish) -> ModelSource:
    """The model in the type that is wished for; all other options of quantisation stay."""
    if wish.isq_type is None:
        return source
    if wish.isq_type == "none":
        return replace(source, isq=None)
    return replace(source, isq=replace(source.isq or IsqOptions(), type=wish.isq_type))
