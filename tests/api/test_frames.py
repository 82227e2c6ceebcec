"""Frames that a running backend rarely makes: held-back text, logprobs without text, deltas out of order."""

import json
from typing import Any

from serve_app.api.backend import Started
from serve_app.api.frames import frame_encoder
from serve_app.api.responses import Head, Tally
from serve_app.messages import Finish, PromptInput, TokenDelta, TokenLogprob, Usage


def _encoder(kind: str, n: int = 1, echo: bool = False, **head: Any) -> Any:
    tally = Tally(PromptInput("r", prompt="P", echo=echo, sampling={"n": n}), 0, False)
    tally.begin(Started(1, [1], "P"))
    return frame_encoder(Head(kind, "id", 1, 'na"me', echo=echo, **head), tally)  # type: ignore[arg-type]


def _choices(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(frame[6:])["choices"][0] for frame in data.decode().split("\n\n") if frame]


def test_nothing_is_sent_while_text_is_held_back():
    encoder = _encoder("chat")
    assert [c["delta"] for c in _choices(encoder.encode(_delta("")))] == [{"role": "assistant", "content": ""}]
    assert encoder.encode(_delta("")) == b""
    assert _encoder("completion").encode(_delta("")) == b""


def test_text_and_finish_of_one_delta_are_two_chunks_of_a_chat():
    encoder = _encoder("chat", include_usage=True)
    _, text, last = _choices(encoder.encode(_delta("end", finish=True)))
    assert (text["delta"], text["finish_reason"]) == ({"content": "end"}, None)
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    (both,) = _choices(_encoder("completion").encode(_delta("end", finish=True)))
    assert (both["text"], both["finish_reason"]) == ("end", "stop")


def test_logprobs_of_held_back_text_are_not_lost():
    logprobs = [TokenLogprob(1, -1.0, [], "x")]
    chat = _encoder("chat", top_logprobs=0)
    shown = _choices(chat.encode(_delta("", logprobs=logprobs)))[1]
    assert shown["delta"] == {"content": ""}
    assert len(shown["logprobs"]["content"]) == 1
    (completion,) = _choices(_encoder("completion", top_logprobs=0).encode(_delta("", logprobs=logprobs)))
    assert completion["logprobs"]["tokens"] == ["x"]


def test_every_text_survives_as_one_line_of_ascii():
    text = 'quote " backslash \\ newline \r\n separator \u2028\u0085 fox 🦊 nul \0'
    for kind in ("chat", "completion"):
        frame = _encoder(kind).encode(_delta(text))
        assert frame.isascii()
        assert all(len(part.splitlines()) == 1 for part in frame.decode().split("\n\n") if part)
        last = _choices(frame)[-1]
        assert (last.get("text") or last["delta"]["content"]) == text


def test_an_echo_with_logprobs_waits_for_the_prompts():
    encoder = _encoder("completion", n=2, echo=True, top_logprobs=0)
    own = [TokenLogprob(1, -1.0, [], "x")]
    assert encoder.encode(_delta("b", choice=1, logprobs=own)) == b""
    first = _delta("a", logprobs=own)
    first.prompt_logprobs = [TokenLogprob(0, None, [], "P")]
    choices = _choices(encoder.encode(first))
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "P"), (0, "a"), (1, "P"), (1, "b")]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0], [1], [0], [1]]


def _delta(text: str, choice: int = 0, logprobs: Any = None, finish: bool = False) -> TokenDelta:
    end = Finish("stop", Usage(1, 1)) if finish else None
    return TokenDelta("r", choice, 0, [1], text, logprobs, end)
