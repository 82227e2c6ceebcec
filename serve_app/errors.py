"""What can go wrong, as a client sees it: each class carries its HTTP status and OpenAI error fields."""

from typing import Any, ClassVar


class ServeError(Exception):
    """An error with a sentence for the client.

    `param` names the request field at fault, `retry_after_s` becomes the Retry-After header. Survives pickling,
    since it crosses actor borders.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.retry_after_s)


def _rebuild(cls: type[ServeError], message: str, param: str | None, retry_after_s: float | None) -> ServeError:
    return cls(message, param=param, retry_after_s=retry_after_s)


class InvalidRequest(ServeError):
    """A field is missing, of the wrong type, or over its limit."""

    status = 400
    type = "invalid_request_error"


class ContextTooLong(InvalidRequest):
    """The prompt does not fit the model's context."""

    code = "context_length_exceeded"


class AuthenticationFailed(ServeError):
    """The API key is missing or wrong."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ModelNotFound(ServeError):
    """No model of that name is served."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class NotFound(ServeError):
    """No such route or object."""

    status = 404
    type = "invalid_request_error"


class MethodNotAllowed(ServeError):
    """The route exists, but not with this HTTP method."""

    status = 405
    type = "invalid_request_error"


class Conflict(ServeError):
    """What is asked for cannot be done as things stand; the message says what stands against it."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class RequestTooLarge(ServeError):
    """The body is over its limit."""

    status = 413
    type = "invalid_request_error"


class QueueFull(ServeError):
    """More requests wait than may; the client is asked to come back."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class NotImplementedHere(ServeError):
    """A part of the API that this server does not offer (yet)."""

    status = 501
    type = "not_implemented_error"
    code = "not_implemented"


class Unavailable(ServeError):
    """No target can answer now: it is loading, lost, or the request waited too long."""

    status = 503
    type = "service_unavailable_error"


class EngineFailed(ServeError):
    """The engine broke while it worked on the request."""

    status = 500
    code = "engine_failed"


class ModelFileError(Exception):
    """A model file is unusable: one sentence that names the file and the tensor or key. The process ends with 2."""


class LaunchError(Exception):
    """The server cannot start with these options or on this machine: one sentence. The process ends with 2."""
