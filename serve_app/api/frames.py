"""TokenDelta -> chunk object -> SSE frame. What does not change within a request is encoded once."""

import json
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any, Protocol

from serve_app.api.logprobs import LegacyLogprobs, chat_logprobs
from serve_app.api.responses import Head, Tally, usage_object
from serve_app.messages import TokenDelta

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

# ASCII with \u escapes: some clients split lines at U+2028 or U+0085 too, which JSON lets stand.
_quote: Callable[[str], str] = encode_basestring_ascii


class FrameEncoder(Protocol):
    """Turns one prompt's deltas into bytes of the stream; b"" when there is nothing to show yet."""

    def encode(self, delta: TokenDelta) -> bytes: ...


def frame_encoder(head: Head, tally: Tally) -> FrameEncoder:
    """The encoder of the answer's kind for one of its prompts."""
    return ChatFrames(head, tally) if head.kind == "chat" else CompletionFrames(head, tally)


def closing_frames(head: Head, tallies: Sequence[Tally]) -> bytes:
    """The end of the stream: the usage chunk if it was asked for, and [DONE]."""
    if not head.include_usage:
        return DONE
    chunk = {**head.fields(streamed=True), "choices": [], "usage": usage_object(tallies)}
    return b"data: " + _dumps(chunk).encode() + b"\n\n" + DONE


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _opening(head: Head) -> str:
    """A chunk up to the index of its choice."""
    return "data: " + _dumps(head.fields(streamed=True))[:-1] + ',"choices":[{"index":'


def _closing(head: Head) -> str:
    """A chunk from after its choice. Where usage was asked for, all chunks but the last say null."""
    return '}],"usage":null}\n\n' if head.include_usage else "}]}\n\n"


class ChatFrames:
    """chat.completion.chunk frames: the role first, then text, then an empty delta with the finish reason."""

    def __init__(self, head: Head, tally: Tally) -> None:
        opening, closing = _opening(head), _closing(head)
        indices = [tally.first_index + number for number in range(len(tally.outputs))]
        self._openings = [f'{opening}{index},"delta":{{' for index in indices]
        self._text_openings = [text + '"content":' for text in self._openings]
        self._plain_end = '},"logprobs":null,"finish_reason":null' + closing
        self._closing = closing
        self._has_role = [False] * len(indices)
        self._shows_logprobs = head.top_logprobs is not None

    def encode(self, delta: TokenDelta) -> bytes:
        number = delta.choice
        if self._has_role[number] and delta.finish is None and not self._shows_logprobs:
            if not delta.text:
                return b""
            return f"{self._text_openings[number]}{_quote(delta.text)}{self._plain_end}".encode("ascii")
        return self._unusual(delta, number).encode("ascii")

    def _unusual(self, delta: TokenDelta, number: int) -> str:
        frames = ""
        if not self._has_role[number]:
            self._has_role[number] = True
            frames += f'{self._openings[number]}"role":"assistant","content":""{self._plain_end}'
        if self._shows_logprobs and delta.logprobs:
            logprobs = _dumps(chat_logprobs(delta.logprobs))
            end = f'}},"logprobs":{logprobs},"finish_reason":null{self._closing}'
            frames += f"{self._text_openings[number]}{_quote(delta.text)}{end}"
        elif delta.text:
            frames += f"{self._text_openings[number]}{_quote(delta.text)}{self._plain_end}"
        if delta.finish is not None:
            end = f'}},"logprobs":null,"finish_reason":{_quote(delta.finish.reason)}{self._closing}'
            frames += self._openings[number] + end
        return frames


class CompletionFrames:
    """text_completion frames. An echoed prompt is the first frame of each choice."""

    def __init__(self, head: Head, tally: Tally) -> None:
        opening = _opening(head)
        numbers = range(len(tally.outputs))
        self._openings = [f'{opening}{tally.first_index + number},"text":' for number in numbers]
        self._closing = _closing(head)
        self._plain_end = ',"logprobs":null,"finish_reason":null' + self._closing
        self._echoes = [tally.prompt.echo for _ in numbers]
        self._logprobs = None if head.top_logprobs is None else [LegacyLogprobs(head.top_logprobs) for _ in numbers]
        self._awaits_prompt = tally.prompt.echo and self._logprobs is not None
        self._held: list[TokenDelta] = []
        self._tally = tally

    def encode(self, delta: TokenDelta) -> bytes:
        number = delta.choice
        if self._echoes[number]:
            return self._after_echo(delta).encode("ascii")
        if self._logprobs is None and delta.finish is None:
            if not delta.text:
                return b""
            return f"{self._openings[number]}{_quote(delta.text)}{self._plain_end}".encode("ascii")
        return self._frame(delta).encode("ascii")

    def _after_echo(self, delta: TokenDelta) -> str:
        """With log-probabilities, nothing is shown before those of the prompt, which come with choice 0."""
        if self._awaits_prompt:
            if delta.prompt_logprobs is None:
                self._held.append(delta)
                return ""
            self._awaits_prompt = False
            self._tally.prompt_logprobs = delta.prompt_logprobs
            held, self._held = self._held, []
            return "".join(self._echo_and_frame(item) for item in (delta, *held))
        return self._echo_and_frame(delta)

    def _echo_and_frame(self, delta: TokenDelta) -> str:
        frames = ""
        if self._echoes[delta.choice]:
            self._echoes[delta.choice] = False
            logprobs = "null"
            if self._logprobs is not None:
                logprobs = _dumps(
                    self._logprobs[delta.choice].echo(self._tally.prompt_logprobs, self._tally.echoed_text)
                )
            text = _quote(self._tally.echoed_text)
            frames = f'{self._openings[delta.choice]}{text},"logprobs":{logprobs},"finish_reason":null{self._closing}'
        return frames + self._frame(delta)

    def _frame(self, delta: TokenDelta) -> str:
        logprobs = "null"
        if self._logprobs is not None and delta.logprobs:
            logprobs = _dumps(self._logprobs[delta.choice].take(delta.logprobs))
        elif not delta.text and delta.finish is None:
            return ""
        finish = "null" if delta.finish is None else _quote(delta.finish.reason)
        text = _quote(delta.text)
        return f'{self._openings[delta.choice]}{text},"logprobs":{logprobs},"finish_reason":{finish}{self._closing}'
