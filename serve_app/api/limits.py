"""How much a request may bring: header and body sizes while they are read, then the counts inside."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from serve_app.api.error_shape import ClientGone, HeadersTooLarge, UnsupportedMediaType
from serve_app.api.schema import ChatRequest, CompletionRequest, GenerationRequest
from serve_app.config import HttpConfig
from serve_app.errors import InvalidRequest, RequestTooLarge

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def check_headers(scope: Mapping[str, Any], config: HttpConfig) -> None:
    """Raises HeadersTooLarge when the header fields, or path and query, are over max_header_bytes."""
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    size += len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
    if size > config.max_header_bytes:
        raise HeadersTooLarge(f"The request's header is larger than {config.max_header_bytes} bytes.")


async def read_json_body(scope: Mapping[str, Any], receive: Receive, config: HttpConfig) -> bytes:
    """The whole body, counted while it is read.

    Raises UnsupportedMediaType unless it is declared as JSON (or not at all), RequestTooLarge, InvalidRequest when it
    takes longer than body_timeout_s, ClientGone.
    """
    headers = dict(scope["headers"])
    media_type = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if media_type != b"application/json" and not media_type.endswith(b"+json"):
        raise UnsupportedMediaType("The body must be JSON: send 'Content-Type: application/json'.")
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > config.max_body_bytes:
        raise _too_large(config)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await _read(receive, config)
    except TimeoutError:
        raise InvalidRequest(f"The body took longer than {config.body_timeout_s:g} s to arrive.") from None


async def _read(receive: Receive, config: HttpConfig) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("client left")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > config.max_body_bytes:
            raise _too_large(config)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(config: HttpConfig) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than {config.max_body_bytes} bytes.")


def check_chat(request: ChatRequest, config: HttpConfig) -> None:
    """Raises InvalidRequest naming the field that is over its limit."""
    if len(request.messages) > config.max_messages:
        raise _over("messages", f"at most {config.max_messages} messages")
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if (request.top_logprobs or 0) > config.max_logprobs:
        raise _over("top_logprobs", f"at most {config.max_logprobs}")
    _check_generation(request, 1, config)


def check_completion(request: CompletionRequest, config: HttpConfig) -> None:
    """Raises InvalidRequest naming the field that is over its limit."""
    if len(request.prompts) > config.max_prompts:
        raise _over("prompt", f"at most {config.max_prompts} prompts")
    if (request.logprobs or 0) > config.max_logprobs:
        raise _over("logprobs", f"at most {config.max_logprobs}")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidRequest("best_of is not supported: all n choices are returned.", param="best_of")
    _check_generation(request, len(request.prompts), config)


def _check_generation(request: GenerationRequest, num_prompts: int, config: HttpConfig) -> None:
    n = request.n or 1
    if n > config.max_n:
        raise _over("n", f"at most {config.max_n}")
    if n * num_prompts > config.max_choices:
        raise _over("n", f"at most {config.max_choices} choices over all prompts")
    if len(request.stop or ()) > config.max_stop:
        raise _over("stop", f"at most {config.max_stop} strings")
    if any(len(text) > config.max_stop_chars for text in request.stop or ()):
        raise _over("stop", f"at most {config.max_stop_chars} characters each")
    if len(request.stop_token_ids or ()) > config.max_stop:
        raise _over("stop_token_ids", f"at most {config.max_stop} ids")
    if len(request.logit_bias or ()) > config.max_logit_bias:
        raise _over("logit_bias", f"at most {config.max_logit_bias} entries")
    if len(request.dry_sequence_breakers or ()) > config.max_stop:
        raise _over("dry_sequence_breakers", f"at most {config.max_stop} strings")
    if any(len(text) > config.max_stop_chars for text in request.dry_sequence_breakers or ()):
        raise _over("dry_sequence_breakers", f"at most {config.max_stop_chars} characters each")
    if request.max_tokens is not None and (request.min_tokens or 0) > request.max_tokens:
        raise InvalidRequest("min_tokens is larger than max_tokens.", param="min_tokens")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream to be true.", param="stream_options")


def _over(param: str, limit: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is over its limit: {limit}.", param=param)
