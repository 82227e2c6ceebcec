"""Log-probabilities in the two shapes of the API.

A token may be a part of a character only: its text then reads bytes:\\xf0\\x9f, as OpenAI writes it, and both shapes
show it so; its bytes are taken from there.
"""

import codecs
import re
from collections.abc import Sequence
from typing import Any

from serve_app.messages import TokenLogprob

# JSON has no infinity; OpenAI writes this for a token that could not be.
_LOWEST = -9999.0

_BYTES = re.compile(r"bytes:(\\x[0-9a-f]{2})+")


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The logprobs object of a chat choice or chunk."""
    content = []
    for token in tokens:
        top = [_chat_token(text, logprob) for (_, logprob), text in zip(token.top, _top_texts(token), strict=True)]
        content.append({**_chat_token(token.token_text, token.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(_raw(text))}


class LegacyLogprobs:
    """Builds the logprobs objects of one completion choice, chunk by chunk, and keeps track of the text's offset.

    text_offset counts characters from the start of the choice's text, of which an echoed prompt is a part.
    """

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def echo(self, tokens: Sequence[TokenLogprob], text: str) -> dict[str, list[Any]]:
        """The object for an echoed prompt and its text, in which control tokens and a first space may be missing."""
        result = _empty()
        for token in tokens:
            self._add(result, token)
            piece = self._decoder.decode(_raw(token.token_text))
            if not text.startswith(piece, self._offset):
                piece = piece.removeprefix(" ")
            if text.startswith(piece, self._offset):
                self._offset += len(piece)
        self._decoder.reset()
        self._offset = len(text)
        return result

    def take(self, tokens: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """The object for the next output tokens."""
        result = _empty()
        for token in tokens:
            self._add(result, token)
            self._offset += len(self._decoder.decode(_raw(token.token_text)))
        return result

    def _add(self, result: dict[str, list[Any]], token: TokenLogprob) -> None:
        result["tokens"].append(token.token_text)
        result["token_logprobs"].append(None if token.logprob is None else _finite(token.logprob))
        result["top_logprobs"].append(self._top(token))
        result["text_offset"].append(self._offset)

    def _top(self, token: TokenLogprob) -> dict[str, float] | None:
        """The k best and, if it is none of them, the chosen token; None for the first token of a prompt."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for (_, logprob), text in zip(token.top[: self._top_k], _top_texts(token), strict=False):
            # Two ids may read the same: the likelier one, which comes first, stays.
            top.setdefault(text, _finite(logprob))
        top.setdefault(token.token_text, _finite(token.logprob))
        return top


def joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Legacy objects one after the other as one."""
    return {name: [item for part in parts for item in part[name]] for name in _empty()}


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _top_texts(token: TokenLogprob) -> list[str]:
    return token.top_texts if len(token.top_texts) == len(token.top) else [str(token_id) for token_id, _ in token.top]


def _raw(text: str) -> bytes:
    if _BYTES.fullmatch(text):
        return bytes.fromhex(text.removeprefix("bytes:").replace("\\x", ""))
    return text.encode()


def _finite(logprob: float | None) -> float:
    if logprob is None or not logprob > _LOWEST:
        return _LOWEST
    return logprob
