"""All that the routes may ask of the rest of the application. Tests give them a fake."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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

    async def metrics(self) -> bytes:
        """All replicas' metrics in Prometheus' text format, summed."""
