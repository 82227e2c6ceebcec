"""Models by hub id, from a hub on the loopback that speaks the few requests of a download."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from serve_app.errors import LaunchError
from serve_app.loaders.hub import is_hub_id, read_token

MODELS = Path(__file__).parents[1] / "data" / "models"
HF = MODELS / "stories260K" / "hf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


class FakeHub(BaseHTTPRequestHandler):
    """Repositories me/plain, me/ggufs, me/private (needs TOKEN) and me/gated; everything else is unknown."""

    requests: ClassVar[list[str]] = []
    repos: ClassVar[dict[str, dict[str, Path]]] = {
        "me/plain": {p.name: p for p in HF.iterdir()} | {"pytorch_model.bin": HF / "tokenizer.model"},
        "me/ggufs": {f"{q}/m-{q}.gguf": MODELS / "stories260K" / f"stories260K-{q}.gguf" for q in ("Q4_0", "F16")},
        "me/private": {p.name: p for p in HF.iterdir()},
        "me/gated": {},
    }

    def do_GET(self) -> None:
        self.requests.append(self.path)
        repo = next((r for r in self.repos if f"/{r}/" in self.path + "/"), None)
        is_admitted = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo == "me/gated":
            self.answer(403, error="GatedRepo")
        elif repo is None or (repo == "me/private" and not is_admitted):
            self.answer(404 if is_admitted else 401, error="RepoNotFound")
        elif "/nowhere" in self.path:
            self.answer(404, error="RevisionNotFound")
        else:
            self.serve(repo, self.repos[repo])

    do_HEAD = do_GET

    def serve(self, repo: str, files: dict[str, Path]) -> None:
        path = self.path.partition("?")[0]
        if "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": sha1(p)} for n, p in files.items()]
            self.answer(200, json.dumps(entries).encode())
        elif "/resolve/" in path:
            name = re.sub(rf"^/{repo}/resolve/[^/]+/", "", path)
            self.answer(200, files[name].read_bytes(), ETag=f'"{sha1(files[name])}"')
        else:
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self.answer(200, json.dumps(info).encode())

    def answer(self, status: int, body: bytes = b"", *, error: str | None = None, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if error is not None:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", f"{error} says the hub")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def sha1(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


Ask = Callable[..., Any]


@contextmanager
def worker(**environment: str) -> Iterator[Ask]:
    """ask(cache folder, model, fields of ModelSource) → what hub_worker.py answers."""
    own = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "MY_TOKEN": TOKEN}
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("hub_worker.py"))],
        env={**os.environ, **own, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        questions, answers = process.stdin, process.stdout
        assert questions is not None
        assert answers is not None

        def ask(cache: Path, model: str, **source: Any) -> Any:
            values = {"token_source": "none", "hf_cache": str(cache), "model": model, **source}
            print(json.dumps(values), file=questions, flush=True)
            return json.loads(answers.readline())

        yield ask
        questions.close()


@pytest.fixture(scope="module")
def ask(endpoint: str) -> Iterator[Ask]:
    """With the hub there."""
    with worker(HF_ENDPOINT=endpoint) as ask:
        yield ask


@pytest.fixture(scope="module")
def ask_without_hub() -> Iterator[Ask]:
    """With nobody listening at the hub's address."""
    with worker(HF_ENDPOINT="http://127.0.0.1:9") as ask:
        yield ask


def test_a_plain_repository_then_the_same_from_the_cache(ask: Ask, ask_without_hub: Ask, tmp_path: Path) -> None:
    expected = {"kind": "plain", "name": "me/plain", "files": ["model.safetensors"]}
    assert ask(tmp_path, "me/plain") == expected
    assert not any("pytorch_model.bin" in path for path in FakeHub.requests)
    FakeHub.requests.clear()
    assert ask(tmp_path, "me/plain", offline=True) == expected
    assert not FakeHub.requests
    assert ask_without_hub(tmp_path, "me/plain") == expected


def test_the_hubs_own_offline_switch_holds(ask: Ask, endpoint: str, tmp_path: Path) -> None:
    with worker(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1") as ask_offline:
        FakeHub.requests.clear()
        assert ask_offline(tmp_path, "me/plain")["message"].startswith("me/plain: is not in the local cache")
        assert not FakeHub.requests
        ask(tmp_path, "me/plain")
        assert ask_offline(tmp_path, "me/plain")["kind"] == "plain"


def test_one_gguf_of_a_repository(ask: Ask, tmp_path: Path) -> None:
    expected = {"kind": "gguf", "name": "me/ggufs", "files": ["m-Q4_0.gguf"]}
    FakeHub.requests.clear()
    assert ask(tmp_path, "me/ggufs", files=["*Q4_0*"]) == expected
    assert not any("m-F16" in path for path in FakeHub.requests)
    assert ask(tmp_path, "me/ggufs", offline=True) == expected


def test_several_ggufs_ask_for_a_choice(ask: Ask, tmp_path: Path) -> None:
    answer = ask(tmp_path, "me/ggufs")
    assert answer["error"] == "ModelFileError"
    assert answer["message"] == "me/ggufs: holds several GGUF models, choose one with -f: m-F16.gguf, m-Q4_0.gguf"


def test_a_token_opens_a_private_repository(ask: Ask, tmp_path: Path) -> None:
    refused = ask(tmp_path, "me/private")
    assert refused["message"].startswith("me/private: is no local file or folder, and the hub has no such repository")
    for source in (f"literal:{TOKEN}", "env:MY_TOKEN"):
        assert ask(tmp_path, "me/private", token_source=source)["kind"] == "plain"


def test_a_tokenizer_by_hub_id(ask: Ask, tmp_path: Path) -> None:
    FakeHub.requests.clear()
    gguf = str(MODELS / "stories260K" / "stories260K-Q4_0.gguf")
    assert ask(tmp_path, gguf, tokenizer="me/plain")["kind"] == "gguf"
    assert any("tokenizer.json" in path for path in FakeHub.requests)
    assert not any("safetensors" in path for path in FakeHub.requests)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"model": "me/unknown"}, "me/unknown: is no local file or folder, and the hub has no such repository"),
        ({"model": "me/gated"}, "me/gated: the hub gives it only to those it has admitted; see --token-source"),
        ({"model": "me/plain", "revision": "nowhere"}, "me/plain: the hub has no revision 'nowhere' of it"),
        ({"model": "me/plain", "offline": True}, "me/plain: is not in the local cache, and offline the hub is not"),
    ],
)
def test_refusals_of_the_hub(source: dict[str, Any], sentence: str, ask: Ask, tmp_path: Path) -> None:
    answer = ask(tmp_path, **source)
    assert answer["error"] == "ModelFileError"
    assert answer["message"].startswith(sentence)
    assert "\n" not in answer["message"]


def test_a_hub_that_is_away_is_one_clear_sentence(ask_without_hub: Ask, tmp_path: Path) -> None:
    answer = ask_without_hub(tmp_path, "me/plain")
    assert answer["error"] == "LaunchError"
    assert answer["message"].startswith(
        "me/plain: is no local file or folder, and the hub (http://127.0.0.1:9) cannot be reached to download it ("
    )
    assert "refused" in answer["message"]
    assert "\n" not in answer["message"]


def test_tokens_come_from_where_the_option_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("  abc\n")
    monkeypatch.setenv("MY_TOKEN", "xyz")
    assert read_token("cache") is None
    assert read_token("none") is False
    assert read_token("literal:a:b") == "a:b"
    assert read_token("env:MY_TOKEN") == "xyz"
    assert read_token(f"path:{tmp_path / 'token'}") == "abc"


@pytest.mark.parametrize("source", ["env:NOT_THERE", "path:/not/there", "literal:", "path:/dev/null", "other"])
def test_tokens_that_are_not_there(source: str) -> None:
    with pytest.raises(LaunchError, match="--token-source"):
        read_token(source)


def test_the_token_is_in_no_message() -> None:
    with pytest.raises(LaunchError) as caught:
        read_token("literall:hf_secret")
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B", "a/b.c_d"])
def test_hub_ids(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize("name", ["", "./a", "/a", "a/b/c", "a b", "a/..", "../a", "~a", "a/", "a\n", "x" * 201])
def test_no_hub_ids(name: str) -> None:
    assert not is_hub_id(name)
