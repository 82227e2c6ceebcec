"""A fake application behind the routes, and a real server in front of them."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from serve_app.api.backend import Backend, DeltaSink, Health, IsqJob, IsqMode, IsqState, ModelCard, Started
from serve_app.api.routes import build_asgi
from serve_app.config import HttpConfig
from serve_app.errors import ServeError
from serve_app.messages import Finish, PromptInput, TokenDelta, TokenLogprob, Usage
from serve_app.metrics import HttpMetrics, merge_snapshots, render

WORDS = ("Once", " upon", " a", " time", " there", " was", " a", " “fox”", "\u2028", " 🦊", ".")


@dataclass
class Live:
    """A request the fake works on."""

    prompt: PromptInput
    sink: DeltaSink
    done: asyncio.Future[None]
    length: int
    position: int = 0


@dataclass
class FakeBackend:
    """Tells the same story to everybody, a word a step, from one pump task, as the real one does.

    tokens_per_step: as many words at once, as where proposed tokens are accepted; one more was proposed in each step.
    A sink with more than `credit` deltas lying is passed over, like a request that is paused for a slow client.
    """

    step_s: float = 0.001
    length: int = len(WORDS)
    credit: int = 64
    words: tuple[str, ...] = WORDS
    tokens_per_step: int = 1
    cards: list[ModelCard] = field(default_factory=lambda: [ModelCard("tiny", 1_700_000_000, 512)])
    state: Health = field(default_factory=lambda: Health(True))
    refusal: ServeError | Exception | None = None
    fail_after: tuple[int, ServeError | Exception] | None = None
    finish_reason: str = "length"
    cached_tokens: int = 3
    admit_after: asyncio.Event | None = None
    http_metrics: HttpMetrics = field(default_factory=HttpMetrics)
    prompts: list[PromptInput] = field(default_factory=list)
    aborted: dict[str, float] = field(default_factory=dict)
    max_backlog: int = 0
    isq_jobs: list[IsqJob] = field(default_factory=list)
    isq_failure: ServeError | None = None

    def __post_init__(self) -> None:
        self._live: dict[str, Live] = {}
        self._pump: asyncio.Task[None] | None = None

    @property
    def num_live(self) -> int:
        return len(self._live)

    async def generate(self, prompt: PromptInput, sink: DeltaSink) -> None:
        self.prompts.append(prompt)
        if self.refusal is not None:
            raise self.refusal
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._run_pump())
        ids = prompt.prompt if isinstance(prompt.prompt, list) else [1, 2, 3, 4]
        text = prompt.prompt if isinstance(prompt.prompt, str) else "<ids>"
        live = Live(prompt, sink, asyncio.get_running_loop().create_future(), self._length(prompt))
        self._live[prompt.request_id] = live
        try:
            sink.begin(Started(len(ids), ids, text if prompt.echo else None))
            await live.done
        except asyncio.CancelledError:
            self.aborted[prompt.request_id] = time.monotonic()
            raise
        finally:
            del self._live[prompt.request_id]

    def _length(self, prompt: PromptInput) -> int:
        return min(self.length, prompt.sampling.get("max_tokens", self.length))

    async def _run_pump(self) -> None:
        while self._live:
            await asyncio.sleep(self.step_s)
            if self.admit_after is not None and not self.admit_after.is_set():
                continue
            for live in list(self._live.values()):
                self.max_backlog = max(self.max_backlog, live.sink.backlog)
                if not live.done.done() and live.sink.backlog <= self.credit:
                    self._step(live)

    def _step(self, live: Live) -> None:
        if self.fail_after is not None and live.position >= self.fail_after[0]:
            live.done.set_exception(self.fail_after[1])
            return
        n = live.prompt.sampling.get("n", 1)
        live.sink.push([self._delta(live, choice) for choice in range(n)])
        live.position += self.tokens_per_step
        if live.position >= live.length:
            live.done.set_result(None)

    def _delta(self, live: Live, choice: int) -> TokenDelta:
        at, sampling = live.position, live.prompt.sampling
        ids = list(range(at, min(at + self.tokens_per_step, live.length)))
        words = [self.words[token_id % len(self.words)] for token_id in ids]
        delta = TokenDelta(live.prompt.request_id, choice, at, ids, "".join(words))
        if sampling.get("logprobs") is not None:
            delta.logprobs = [_logprob(i, word, sampling["logprobs"]) for i, word in zip(ids, words, strict=True)]
        if sampling.get("prompt_logprobs") and at == 0 and choice == 0:
            first = TokenLogprob(1, None, [], "Say", [])
            delta.prompt_logprobs = [first, _logprob(2, " it", sampling["logprobs"])]
        if at + len(ids) == live.length:
            num_steps = -(-live.length // self.tokens_per_step)
            rejected = num_steps if self.tokens_per_step > 1 else 0
            usage = Usage(4, live.length, self.cached_tokens, live.length - num_steps, rejected)
            delta.finish = Finish(self.finish_reason, usage)  # type: ignore[arg-type]
        return delta

    async def models(self) -> list[ModelCard]:
        return self.cards

    async def health(self) -> Health:
        return self.state

    async def requantize(self, isq_type: str, mode: IsqMode, target: str) -> IsqJob:
        if self.refusal is not None:
            raise self.refusal
        job = IsqJob(f"reisq-{len(self.isq_jobs)}", isq_type, "none", mode, target, 1_700_000_000, 1)
        self.isq_jobs.insert(0, job)
        return job

    async def wait_for_isq(self, job_id: str) -> IsqJob:
        job = next(job for job in self.isq_jobs if job.id == job_id)
        job.state, job.progress, job.finished = "done", 1.0, 1_700_000_003
        if self.isq_failure is not None:
            job.state, job.progress, job.error = "failed", 0.5, self.isq_failure
        return job

    async def isq_state(self) -> IsqState:
        done = next((job.isq_type for job in self.isq_jobs if job.state == "done"), "none")
        return IsqState([done], self.isq_jobs)

    async def metrics(self) -> bytes:
        return render(merge_snapshots([self.http_metrics.snapshot()]))


def _logprob(token_id: int, text: str, k: int) -> TokenLogprob:
    texts = [text, " other", " third"][:k]
    return TokenLogprob(token_id, -0.5, [(token_id + i, -0.5 - i) for i in range(len(texts))], text, texts)


class Server:
    """A uvicorn server on a loopback port of its own, in a thread."""

    def __init__(
        self, backend: Backend, config: HttpConfig, metrics: HttpMetrics | None = None, **options: Any
    ) -> None:
        app = build_asgi(lambda: backend, config, metrics=metrics)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=1, **options)
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Server":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self.socket.close()
        assert not self._thread.is_alive()

    def client(self, key: str = "unused") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers: serve(backend, **HttpConfig fields)."""
    with contextlib.ExitStack() as stack:

        def start(backend: FakeBackend, **fields: Any) -> Server:
            server = Server(backend, HttpConfig(**fields), backend.http_metrics).start()
            stack.callback(server.stop)
            return server

        yield start


Asgi = Callable[..., httpx.AsyncClient]


@pytest.fixture
async def asgi() -> AsyncIterator[Asgi]:
    """Clients of the application without a server between: asgi(backend, **HttpConfig fields)."""
    async with contextlib.AsyncExitStack() as stack:

        def client(backend: FakeBackend, **fields: Any) -> httpx.AsyncClient:
            app = build_asgi(lambda: backend, HttpConfig(**fields), metrics=backend.http_metrics)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            new = httpx.AsyncClient(transport=transport, base_url="http://test")
            stack.push_async_callback(new.aclose)
            return new

        yield client


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()
