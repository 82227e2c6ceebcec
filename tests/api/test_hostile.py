"""What a hostile or broken client sends: never a 500, never more work than its size allows, never past the keys."""

import asyncio
import contextlib
import json
import socket
import time
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.api.routes import build_asgi
from serve_app.api.schema import ChatRequest, CompletionRequest
from serve_app.config import HttpConfig

CHAT = "/v1/chat/completions"
ROUTES = [CHAT, "/v1/completions", "/v1/models", "/v1/models/tiny", "/metrics", "/v1/embeddings", "/nowhere"]

_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 0, 1e308, "", "text", "json_object"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
_messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "nobody"]) | _json},
        optional={
            "content": _json | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": _json}), max_size=2),
            "tool_calls": st.lists(st.fixed_dictionaries({"function": _json}), max_size=2) | _json,
            "name": _json,
        },
    ),
    max_size=3,
)
_FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "max_completion_tokens"})
_bodies = st.fixed_dictionaries(
    {"messages": _messages | _json | st.just("hi"), "prompt": _json | st.just("hi")},
    optional={name: _json for name in _FIELDS if name not in ("messages", "prompt")},
)


@pytest.fixture
def quick_app(backend) -> Any:
    backend.step_s, backend.length = 0, 1
    return build_asgi(lambda: backend, HttpConfig())


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(body=_bodies, path=st.sampled_from([CHAT, "/v1/completions"]))
def test_no_json_body_breaks_the_server(quick_app, body, path):
    response = asyncio.run(_post(quick_app, path, json.dumps(body).encode()))
    assert response.status_code in (200, 400, 501), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=64) | st.text(max_size=64).map(lambda text: text.encode("utf-8", "replace")))
def test_no_bytes_break_the_server(quick_app, body):
    assert asyncio.run(_post(quick_app, CHAT, body)).status_code == 400


async def _post(app: Any, path: str, body: bytes) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.post(path, content=body)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "host", ["localhost/health?", "localhost/health#", "x/v1/models?", "localhost:1234/health?a=", "a b", ""]
)
def test_the_host_header_opens_nothing(serve, backend, path, host):
    server = serve(backend, api_keys=("secret",))
    method = "POST" if "completions" in path else "GET"
    status, _ = _raw(server, f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
    assert status in (400, 401)
    assert backend.prompts == []


@pytest.mark.parametrize(
    "target", ["/health/../v1/models", "/v1/models?x=/health", "//health", "/health%2f..%2fmetrics"]
)
def test_odd_paths_do_not_pass_as_health(serve, backend, target):
    server = serve(backend, api_keys=("secret",))
    status, _ = _raw(server, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert status in (400, 401, 404)


@pytest.mark.parametrize("size", [2**16, 2**20])
def test_a_huge_header_is_refused(serve, backend, size):
    server = serve(backend)
    status, body = _raw(server, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * size + b"\r\n\r\n")
    assert status == 431
    assert body["error"]["type"] == "invalid_request_error"


def test_a_huge_query_is_refused(serve, backend):
    status, _ = _raw(serve(backend), b"GET /health?" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status in (400, 431)


def test_a_declared_body_over_the_limit_is_refused_unread(serve, backend):
    server = serve(backend, max_body_bytes=1000)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n"
    status, body = _raw(server, head.encode())
    assert status == 413
    assert "1000 bytes" in body["error"]["message"]


def test_a_chunked_body_over_the_limit_is_cut_off(serve, backend):
    server = serve(backend, max_body_bytes=1000)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, _ = _raw(server, head.encode() + (b"100\r\n" + b" " * 256 + b"\r\n") * 5)
    assert status == 413


def test_a_body_that_never_comes_is_given_up(serve, backend):
    server = serve(backend, body_timeout_s=0.2)
    began = time.monotonic()
    status, _ = _raw(server, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    assert status == 400
    assert time.monotonic() - began < 3


def test_two_lengths_in_one_request_do_not_smuggle_a_second(serve, backend):
    server = serve(backend)
    inner = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {5 + len(inner)}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + b"0\r\n\r\n" + inner)
        connection.shutdown(socket.SHUT_WR)
        answer = _read_all(connection)
    assert answer.startswith(b"HTTP/1.1 4")
    assert b"sirocco_requests_total" not in answer


SPECULATIVE: list[tuple[str, Any, str]] = [
    ("speculative", True, "speculative"),
    ("speculative", [], "speculative"),
    ("speculative", {"gamma": 3}, "speculative"),
    ("speculative", {"enabled": True, "Max": 3}, "speculative"),
    ("speculative", {"enabled": "no"}, "speculative.enabled"),
    ("speculative", {"enabled": 0}, "speculative.enabled"),
    ("speculative", {"max_tokens": -1}, "speculative.max_tokens"),
    ("speculative", {"max_tokens": 17}, "speculative.max_tokens"),
    ("speculative", {"max_tokens": 2.0}, "speculative.max_tokens"),
    ("speculative", {"max_tokens": True}, "speculative.max_tokens"),
]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("n", 10**9, "n"),
        ("n", 0, "n"),
        ("best_of", 10**9, "best_of"),
        ("logprobs", 10**9, "logprobs"),
        ("stop", ["x"] * 17, "stop"),
        ("stop", "x" * 257, "stop"),
        ("stop", [""], "stop"),
        ("stop", "", "stop"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "logit_bias"),
        ("logit_bias", {"-1": 1}, "logit_bias"),
        ("logit_bias", {"1": 101}, "logit_bias"),
        ("logit_bias", {"1": 1, "01": 2}, "logit_bias"),
        ("temperature", -0.1, "temperature"),
        ("temperature", 2.1, "temperature"),
        ("temperature", "1", "temperature"),
        ("top_p", 1.1, "top_p"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 5.0, "max_tokens"),
        ("max_tokens", True, "max_tokens"),
        ("max_completion_tokens", 0, "max_completion_tokens"),
        ("seed", 2**70, "seed"),
        ("prompt", [], "prompt"),
        ("prompt", [[]], "prompt"),
        ("prompt", [1, "a"], "prompt"),
        ("prompt", [-1], "prompt"),
        ("prompt", ["x"] * 129, "prompt"),
        ("prompt", None, "prompt"),
        ("suffix", "end", "suffix"),
        ("min_tokens", 20, "min_tokens"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("prompt_embeds", "AAAA", "prompt_embeds"),
        ("response_format", {"type": "xml"}, "response_format"),
        ("tool_choice", "required", "tool_choice"),
        ("stop_token_ids", list(range(17)), "stop_token_ids"),
        ("dry_sequence_breakers", ["x"] * 17, "dry_sequence_breakers"),
        ("model", 5, "model"),
        *SPECULATIVE,
    ],
)
async def test_a_completion_over_its_limits_names_the_field(asgi, backend, field, value, param):
    body = {"prompt": "x", "max_tokens": 10, field: value}
    response = await asgi(backend).post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert param in response.json()["error"]["message"]
    assert backend.prompts == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 2049}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        *(({field: value}, param) for field, value, param in SPECULATIVE),
    ],
)
async def test_a_chat_over_its_limits_names_the_field(asgi, backend, fields, param):
    response = await asgi(backend).post(CHAT, json={"messages": "hi", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert backend.prompts == []


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": {"type": "regex", "value": "a*"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"adapter": "a"},
        {"adapters": ["a"]},
        {"web_search_options": {}},
        {"session_id": "s"},
        {"files": []},
        {"audio": {"voice": "x"}},
        {"modalities": ["text", "audio"]},
        {"enable_shell": True},
    ],
)
async def test_what_is_not_honoured_is_refused_by_name(asgi, backend, fields):
    response = await asgi(backend).post(CHAT, json={"messages": "hi", **fields})
    assert response.status_code == 501
    assert response.json()["error"]["param"] in fields
    assert backend.prompts == []


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_a_form_is_not_a_request(asgi, backend, content_type):
    # A page of another origin can send these without asking first.
    response = await asgi(backend).post(CHAT, content=b'{"messages": "hi"}', headers={"Content-Type": content_type})
    assert response.status_code == 415
    assert backend.prompts == []


def _raw(server: Any, request: bytes) -> tuple[int, Any]:
    with server.connect() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(request)
        answer = connection.recv(1 << 16)
        # The head may come by itself.
        while answer.endswith(b"\r\n\r\n") and (more := connection.recv(1 << 16)):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    return int(head.split()[1]), parsed


def _read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)
