"""API keys. The path that decides is scope["path"], as for the routing: a URL built from the Host header lies."""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

from serve_app.errors import AuthenticationFailed

_OPEN_PATHS = frozenset({"/health"})


class KeyRing:
    """The keys that open this server; without any, every request may pass."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)

    def admit(self, scope: Mapping[str, Any]) -> bytes:
        """The tenant: a secret-free name of the key that was used, b"" where none is needed.

        Raises AuthenticationFailed. Every key is compared in constant time, and always all of them.
        """
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._digests or path in _OPEN_PATHS:
            return b""
        given = _digest(_presented_key(scope["headers"]))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            raise AuthenticationFailed("The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.")
        return hashlib.blake2b(given, digest_size=16, person=b"tenant").digest()


def _digest(key: bytes) -> bytes:
    """Keys of any length as equally long strings, so that a comparison tells nothing of the length."""
    return hashlib.sha256(key).digest()


def _presented_key(headers: list[tuple[bytes, bytes]]) -> bytes:
    given = [value for name, value in headers if name == b"authorization"]
    if len(given) != 1:
        raise AuthenticationFailed("Send the API key once, as 'Authorization: Bearer KEY'.")
    scheme, _, key = given[0].partition(b" ")
    if scheme.lower() != b"bearer" or not key.strip():
        raise AuthenticationFailed("Send the API key as 'Authorization: Bearer KEY'.")
    return key.strip()
