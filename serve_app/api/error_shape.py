"""Errors in OpenAI's shape: the only place that turns an exception into a response."""

import json
import logging
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve_app.errors import InvalidRequest, MethodNotAllowed, NotFound, RequestTooLarge, ServeError

log = logging.getLogger(__name__)


class HeadersTooLarge(RequestTooLarge):
    """The header fields together are over their limit."""

    status = 431


class UnsupportedMediaType(InvalidRequest):
    """The body is not JSON."""

    status = 415


class InternalError(ServeError):
    """Something of ours broke: the client learns no more than that."""

    code = "internal_error"


class ClientGone(Exception):
    """The client left, or stopped reading: nobody is there to be answered."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def as_serve_error(error: BaseException) -> ServeError:
    """What the client is told of any exception. What is not a ServeError is logged in full and answered in general."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            return MethodNotAllowed("This route does not take that method.")
        if error.status_code == 404:
            return NotFound("There is no such route.")
        return InvalidRequest(str(error.detail))
    log.error("A request failed with an unexpected error.", exc_info=error)
    return InternalError("The server failed to answer this request.")


def error_object(error: ServeError) -> dict[str, Any]:
    """{"error": {"message", "type", "param", "code"}}."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_headers(error: ServeError) -> dict[str, str]:
    """Retry-After in whole seconds, at least 1, on 429 and 503; the scheme on 401; a close where the body is unread."""
    headers: dict[str, str] = {}
    if error.status in (429, 503):
        seconds = error.retry_after_s if error.retry_after_s is not None else 1.0
        headers["retry-after"] = str(max(1, math.ceil(min(seconds, 3600.0))))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (413, 431):
        headers["connection"] = "close"
    return headers


def error_response(error: ServeError) -> Response:
    return Response(
        json.dumps(error_object(error)), error.status, headers=error_headers(error), media_type="application/json"
    )


def error_frame(error: ServeError) -> bytes:
    """The error as an event of a stream that has begun."""
    return b"data: " + json.dumps(error_object(error)).encode() + b"\n\n"
