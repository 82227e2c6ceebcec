"""What crosses a process border. The wire form of the token path is in deployments/token_pump.py."""

from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app.errors import ServeError
from serve_app.options import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class PromptInput:
    """A client's request before template and tokenizer.

    Exactly one of messages (chat) and prompt (text or ids) is set. sampling holds only the SamplingParams fields that
    the client named: the model's generation_config fills the others.
    """

    request_id: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    truncate_sequence: bool = False
    echo: bool = False
    cache_salt: bytes = b""


@dataclass(slots=True)
class StreamAddress:
    """Where a target sends a request's tokens: an ingress replica's pump, of one life (epoch) of that replica."""

    ingress_id: str
    epoch: int
    node_id: str
    ipc_endpoint: str
    tcp_endpoint: str
    server_key: bytes


@dataclass(slots=True)
class GenerateRequest:
    """A request as the engine takes it. prompt_text is set where the response repeats the prompt (echo).

    cache_salt separates tenants in the prefix cache: blocks are only found again under the same salt.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    cache_salt: bytes = b""
    prompt_text: str | None = None
    stream_to: StreamAddress | None = None


@dataclass(slots=True)
class TokenLogprob:
    """One token's log-probability and the k best alternatives as (id, log-probability), best first.

    From the model's distribution before temperature and filters. logprob is None for the first prompt token. The text
    of a token that is only a part of a character is written as OpenAI does, bytes:\\xf0\\x9f, so that nothing is lost.
    """

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]
    token_text: str = ""
    top_texts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Usage:
    """Token counts of one request, all its choices together.

    accepted_tokens: of the output, those that were proposed before they were drawn; rejected_tokens: proposed in vain.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0


@dataclass(slots=True)
class Finish:
    """Why a choice ended. usage counts this choice's output; stop_reason is the stop string or token id that hit.

    error is set with reason 'error' (queue timeout, engine failure, shutdown). It never travels the token path: the
    target raises it from the call that stays open for the request.
    """

    reason: FinishReason
    usage: Usage
    stop_reason: str | int | None = None
    error: ServeError | None = None


@dataclass(slots=True)
class TokenDelta:
    """What one step added to one choice of a request.

    index is the number of this choice's output tokens before this delta: receivers check it for gaps. text may lag
    behind token_ids while bytes of a character, or what may begin a stop string, are held back. prompt_logprobs come
    once, with the first delta of choice 0.
    """

    request_id: str
    choice: int
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
