"""Whole answers: what a request's deltas add up to, and the objects of the API made of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app import __version__
from serve_app.api.backend import ModelCard, Started
from serve_app.api.logprobs import LegacyLogprobs, chat_logprobs, joined
from serve_app.errors import EngineFailed, ServeError, Unavailable
from serve_app.messages import Finish, PromptInput, TokenDelta, TokenLogprob, Usage

FINGERPRINT = f"sirocco-{__version__}"
Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class Head:
    """What all objects of one answer repeat; echo and top_logprobs (None: no logprobs) as the client asked."""

    kind: Kind
    id: str
    created: int
    model: str
    echo: bool = False
    top_logprobs: int | None = None
    include_usage: bool = False

    def fields(self, streamed: bool) -> dict[str, Any]:
        """The fields before choices."""
        chat = "chat.completion.chunk" if streamed else "chat.completion"
        return {
            "id": self.id,
            "object": chat if self.kind == "chat" else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }


@dataclass(slots=True)
class Output:
    """What became of one choice so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0
    finish: Finish | None = None


class Tally:
    """Adds up one prompt's deltas. keep_text is False where the text only passes through, to a stream."""

    def __init__(self, prompt: PromptInput, first_index: int, keep_text: bool) -> None:
        self.prompt = prompt
        self.first_index = first_index
        self.outputs = [Output() for _ in range(prompt.sampling.get("n", 1))]
        self.prompt_logprobs: list[TokenLogprob] = []
        self.prompt_tokens = 0
        self._prompt_text: str | None = None
        self._keep_text = keep_text

    def begin(self, started: Started) -> None:
        self.prompt_tokens = started.prompt_tokens
        self._prompt_text = started.prompt_text

    @property
    def echoed_text(self) -> str:
        """The prompt as the answer repeats it, empty unless asked for."""
        if not self.prompt.echo:
            return ""
        if self._prompt_text is not None:
            return self._prompt_text
        return self.prompt.prompt if isinstance(self.prompt.prompt, str) else ""

    def add(self, delta: TokenDelta) -> None:
        output = self.outputs[delta.choice]
        output.num_tokens += len(delta.token_ids)
        if self._keep_text:
            output.text.append(delta.text)
            if delta.logprobs:
                output.logprobs.extend(delta.logprobs)
            if delta.prompt_logprobs:
                self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish is not None:
            output.finish = delta.finish

    def usage(self) -> Usage:
        """Counts over all choices; of one that has not finished, what was seen of it."""
        finishes = [output.finish for output in self.outputs if output.finish is not None]
        output_tokens = sum(o.finish.usage.completion_tokens if o.finish else o.num_tokens for o in self.outputs)
        prompt_tokens = max([self.prompt_tokens, *(finish.usage.prompt_tokens for finish in finishes)])
        # The other choices share the first one's prompt: that is no hit of the prefix cache.
        first = self.outputs[0].finish
        return Usage(
            prompt_tokens,
            output_tokens,
            cached_tokens=first.usage.cached_tokens if first else 0,
            accepted_tokens=sum(finish.usage.accepted_tokens for finish in finishes),
            rejected_tokens=sum(finish.usage.rejected_tokens for finish in finishes),
        )

    def failure(self) -> ServeError | None:
        """The error that ended this request, if one did. To be asked once the backend is done."""
        for output in self.outputs:
            if output.finish is None:
                return EngineFailed("The engine ended the request without a finish reason.")
            if output.finish.reason == "error":
                return output.finish.error or EngineFailed("The engine failed while it worked on this request.")
            if output.finish.reason == "abort":
                return output.finish.error or Unavailable("The request was aborted by the server.")
        return None


def usage_object(tallies: Sequence[Tally]) -> dict[str, Any]:
    """The usage of all prompts together."""
    usages = [tally.usage() for tally in tallies]
    prompt = sum(usage.prompt_tokens for usage in usages)
    output = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(usage.accepted_tokens for usage in usages),
            "rejected_prediction_tokens": sum(usage.rejected_tokens for usage in usages),
        },
    }


def answer(head: Head, tallies: Sequence[Tally]) -> dict[str, Any]:
    """The whole answer of a request that was not streamed: choices prompt by prompt."""
    choices = [_choice(head, tally, number) for tally in tallies for number in range(len(tally.outputs))]
    return {**head.fields(streamed=False), "choices": choices, "usage": usage_object(tallies)}


def _choice(head: Head, tally: Tally, number: int) -> dict[str, Any]:
    output = tally.outputs[number]
    assert output.finish is not None
    text = "".join(output.text)
    choice: dict[str, Any] = {"index": tally.first_index + number, "finish_reason": output.finish.reason}
    if head.kind == "chat":
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        choice["logprobs"] = None if head.top_logprobs is None else chat_logprobs(output.logprobs)
    else:
        choice["text"] = tally.echoed_text + text
        choice["logprobs"] = None if head.top_logprobs is None else _legacy(head.top_logprobs, tally, output)
    return choice


def _legacy(top_k: int, tally: Tally, output: Output) -> dict[str, list[Any]]:
    builder = LegacyLogprobs(top_k)
    return joined([builder.echo(tally.prompt_logprobs, tally.echoed_text), builder.take(output.logprobs)])


def model_object(card: ModelCard) -> dict[str, Any]:
    """A model as GET /v1/models shows it."""
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "local",
        "root": card.id,
        "max_model_len": card.max_model_len,
    }
