"""The outermost layer of the ASGI application: what every request passes, whatever its route."""

import logging
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve_app.api.auth import KeyRing
from serve_app.api.call import SCOPE_KEY, Call
from serve_app.api.error_shape import ClientGone, as_serve_error, error_response
from serve_app.api.limits import check_headers
from serve_app.api.request_log import RequestLog, record_of
from serve_app.api.run import AlreadySent
from serve_app.config import HttpConfig
from serve_app.errors import NotFound
from serve_app.metrics import HttpMetrics

log = logging.getLogger(__name__)


class Application(FastAPI):
    """FastAPI with header limits, keys, counts, request log and OpenAI's error shape around it.

    Not a middleware, since the framework's own layers stand outside of those: here every answer is seen, their errors
    too, and a stream can go past them all.
    """

    def __init__(self, config: HttpConfig, metrics: HttpMetrics, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._config = config
        self._http_metrics = metrics
        self._keys = KeyRing(config.resolve_api_keys())
        self._request_log = RequestLog(config.request_logging_file) if config.request_logging_file else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "There are no websockets here."})
        else:
            await super().__call__(scope, receive, send)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        call = Call(send)
        scope[SCOPE_KEY] = call
        self._http_metrics.in_flight += 1
        has_started = False

        async def counted_send(message: Any) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                call.code = message["status"]
            await send(message)

        try:
            check_headers(scope, self._config)
            call.proxy_id = _proxy_id(scope["headers"])
            call.tenant = self._keys.admit(scope)
            await super().__call__(scope, receive, counted_send)
        except Exception as error:
            # Of those from inside, only unexpected ones come here: FastAPI answers them by on_error, then raises again.
            if not has_started:
                await self.on_error(call, error)(scope, receive, counted_send)
            elif call.error is None:
                log.error("A request failed after its response had begun.", exc_info=error)
        finally:
            self._http_metrics.in_flight -= 1
            self._close_call(call, scope)

    def on_error(self, call: Call, error: Exception) -> Response:
        """The response to an exception, which the request log will tell of."""
        if isinstance(error, ClientGone):
            self._http_metrics.disconnects[error.reason] += 1
            return AlreadySent()
        call.error = as_serve_error(error)
        response = error_response(call.error)
        if isinstance(error, HTTPException) and error.headers:
            response.headers.update(error.headers)
        return response

    def _close_call(self, call: Call, scope: Any) -> None:
        route = scope.get("route")
        endpoint = "other" if route is None or isinstance(call.error, NotFound) else route.path
        self._http_metrics.requests[endpoint, call.code] += 1
        if self._request_log is not None and call.body is not None:
            self._request_log.write(record_of(call, endpoint))

    def close(self) -> None:
        """Writes the rest of the request log. The application may not be called afterwards."""
        if self._request_log is not None:
            self._request_log.close()
            self._request_log = None


def _proxy_id(headers: list[tuple[bytes, bytes]]) -> str | None:
    return next((value.decode("latin-1")[:128] for name, value in headers if name == b"x-request-id"), None)
