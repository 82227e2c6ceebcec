"""Keys: on every route but /health, compared in constant time, in no log."""

import hashlib
import hmac

import openai
import pytest

from serve_app.api import auth
from serve_app.api.auth import KeyRing
from serve_app.errors import AuthenticationFailed

PATHS = [
    "/v1/models",
    "/v1/models/tiny",
    "/metrics",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/nowhere",
    "/openapi.json",
]


@pytest.mark.parametrize("path", PATHS)
async def test_every_route_but_health_needs_the_key(asgi, backend, path):
    client = asgi(backend, api_keys=("secret",))
    response = await client.get(path)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert (await client.get("/health")).status_code == 200
    assert (await client.get(path, headers={"Authorization": "Bearer secret"})).status_code != 401


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", "Bearer Secret")],
        [("Authorization", "Bearer secretsecret")],
        [("Authorization", "Bearer ")],
        [("Authorization", "secret")],
        [("Authorization", "Basic secret")],
        [("Authorization", "Bearer nonsense"), ("Authorization", "Bearer secret")],
        [("X-Api-Key", "secret")],
    ],
)
async def test_what_is_not_the_key_is_refused(asgi, backend, headers):
    assert (await asgi(backend, api_keys=("secret",)).get("/v1/models", headers=headers)).status_code == 401


def test_the_official_client_gets_in(serve, backend):
    server = serve(backend, api_keys=("one", "two"))
    assert [model.id for model in server.client("two").models.list()] == ["tiny"]
    with pytest.raises(openai.AuthenticationError):
        server.client("three").models.list()


def test_all_keys_are_compared_and_by_compare_digest(monkeypatch):
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def watched(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    ring = KeyRing(("first", "a much longer second key"))
    monkeypatch.setattr(auth.hmac, "compare_digest", watched)
    assert ring.admit(_scope(b"Bearer first")) != b""
    size = hashlib.sha256().digest_size
    assert compared == [(size, size), (size, size)]


def test_keys_are_tenants_apart():
    ring = KeyRing(("one", "two"))
    assert ring.admit(_scope(b"Bearer one")) == ring.admit(_scope(b"bearer one"))
    assert ring.admit(_scope(b"Bearer one")) != ring.admit(_scope(b"Bearer two"))
    assert KeyRing(()).admit(_scope(b"Bearer one")) == b""


def test_an_application_below_a_path_keeps_its_door():
    ring = KeyRing(("one",))
    scope = {**_scope(b""), "path": "/base/health", "root_path": "/base"}
    assert ring.admit(scope) == b""
    with pytest.raises(AuthenticationFailed):
        ring.admit({**scope, "path": "/base/metrics"})


async def test_keys_separate_the_prefix_cache(asgi, backend):
    client = asgi(backend, api_keys=("one", "two"))
    for key, salt in [("one", None), ("two", None), ("one", "s"), ("two", "s"), ("one", None)]:
        body = {"prompt": "x", **({"cache_salt": salt} if salt else {})}
        await client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    salts = [prompt.cache_salt for prompt in backend.prompts]
    assert len(set(salts)) == 4
    assert salts[0] == salts[4]
    assert not any(b"one" in salt or b"two" in salt for salt in salts)


def _scope(authorization: bytes) -> dict[str, object]:
    return {"path": "/v1/models", "headers": [(b"authorization", authorization)]}
