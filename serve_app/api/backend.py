"""All that the routes may ask of the rest of the application. Tests give them a fake."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from serve_app.errors import ServeError
from serve_app.messages import PromptInput, TokenDelta


@dataclass(slots=True)
class ModelCard:
    """A served model as GET /v1/models shows it. created in Unix seconds."""

    id: str
    created: int
    max_model_len: int


@dataclass(slots=True)
class Health:
    """is_ready only when a target can answer now; reason says what is missing otherwise."""

    is_ready: bool
    reason: str = ""


@dataclass(slots=True)
class Started:
    """What is known of a request before its first token. prompt_text is set if the request asked for echo."""

    prompt_tokens: int
    prompt_ids: list[int]
    prompt_text: str | None = None


class DeltaSink(Protocol):
    """The receiving end of one request's tokens. All calls come from the event loop; none may block."""

    def begin(self, started: Started) -> None:
        """Called once, before the first push."""

    def push(self, deltas: Sequence[TokenDelta]) -> None:
        """Takes what the last step (or steps, when behind) brought, in order."""

    @property
    def backlog(self) -> int:
        """Deltas accepted but not yet taken by the client: the pump stops giving credit when it grows."""


IsqMode = Literal["drain", "swap"]
IsqJobState = Literal["preparing", "draining", "switching", "done", "failed"]


@dataclass(slots=True)
class IsqJob:
    """A change of the type of a model's weights while it serves.

    in_place: on some replica old and new weights do not fit beside each other. progress: of the preparation, 0 to 1, of
    the replica that has come least far. created, finished in Unix seconds. error: why it failed; the old weights serve.
    """

    id: str
    isq_type: str
    from_type: str
    mode: IsqMode
    target: str
    created: int
    replicas: int
    in_place: bool = False
    state: IsqJobState = "preparing"
    progress: float = 0.0
    finished: int | None = None
    error: ServeError | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will change."""
        return self.state in ("done", "failed")


@dataclass(slots=True)
class IsqState:
    """The types that targets serve now (one, where no job is at work), and the jobs, the newest first.

    draft_types: the same of the draft model, none while it is away; None: there is no draft model.
    """

    isq_types: list[str]
    jobs: list[IsqJob]
    draft_types: list[str] | None = None


class Backend(Protocol):
    """The application behind the HTTP routes."""

    async def generate(self, prompt: PromptInput, sink: DeltaSink) -> None:
        """Runs one request to its end; every choice's last delta carries its finish.

        Raises ServeError. Cancelling the call aborts the request and frees its blocks.
        """

    async def models(self) -> list[ModelCard]:
        """The served models, the default one first."""

    async def health(self) -> Health:
        """Whether a target can answer now."""

    async def requantize(self, isq_type: str, mode: IsqMode, target: str) -> IsqJob:
        """Begins to change the type of the weights that `target` serves with; the job goes on by itself.

        Raises InvalidRequest for a bad type, NotFound for a target that there is not, Conflict where a job is at work
        or memory does not suffice, Unavailable where no replica answers.
        """

    async def wait_for_isq(self, job_id: str) -> IsqJob:
        """The job once it is over. For jobs of this process; cancelling the call leaves the job alone."""

    async def isq_state(self) -> IsqState:
        """What is served, and the jobs of all ingress replicas."""

    async def metrics(self) -> bytes:
        """All replicas' metrics in Prometheus' text format, summed."""
