"""What is known of one HTTP request while it is answered."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from serve_app.api.stream import Send
from serve_app.errors import ServeError

SCOPE_KEY = "sirocco.call"


@dataclass(slots=True)
class Call:
    """One HTTP request. send is the server's own: a stream goes past the middleware, which costs a token nothing.

    code is the status that was sent, 499 if the client left before one was. proxy_id is the X-Request-Id that a proxy,
    or the client, gave it: for the log alone, since it need not be unique. outcome is what the request log tells of the
    answer: choices, usage, timings.
    """

    send: Send
    tenant: bytes = b""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = field(default_factory=time.monotonic)
    code: int = 499
    body: dict[str, Any] | None = None
    error: ServeError | None = None
    proxy_id: str | None = None
    outcome: dict[str, Any] = field(default_factory=dict)
