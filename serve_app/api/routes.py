"""The routes: one short function per endpoint."""

from collections.abc import Callable

from fastapi import FastAPI

from serve_app.api.backend import Backend
from serve_app.config import HttpConfig
from serve_app.metrics import HttpMetrics


def build_asgi(
    get_backend: Callable[[], Backend], config: HttpConfig, *, metrics: HttpMetrics | None = None
) -> FastAPI:
    """The OpenAI API over `get_backend()`, which is asked anew for each request.

    metrics: where this process counts its requests and tokens; the caller merges its snapshot into Backend.metrics().
    """
    raise NotImplementedError
