"""The routes: one short function per endpoint."""

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from serve_app import __version__
from serve_app.api import isq
from serve_app.api.application import Application
from serve_app.api.backend import Backend, IsqJob
from serve_app.api.call import SCOPE_KEY, Call
from serve_app.api.convert import chat_prompt, completion_prompts
from serve_app.api.error_shape import ClientGone, error_headers, error_object
from serve_app.api.json_body import parse_object
from serve_app.api.later import later_routes
from serve_app.api.limits import check_chat, check_completion, read_json_body
from serve_app.api.model_names import find_listed, resolve
from serve_app.api.refusals import refuse_in_chat, refuse_in_completion
from serve_app.api.responses import Head, model_object
from serve_app.api.run import Generation
from serve_app.api.schema import ChatRequest, CompletionRequest, IsqRequest, parse_request
from serve_app.config import HttpConfig
from serve_app.errors import NotImplementedHere, ServeError, Unavailable
from serve_app.metrics import HttpMetrics


def build_asgi(
    get_backend: Callable[[], Backend], config: HttpConfig, *, metrics: HttpMetrics | None = None
) -> FastAPI:
    """The OpenAI API over `get_backend()`, which is asked anew for each request.

    metrics: where this process counts its requests; the caller merges its snapshot into Backend.metrics(). Raises
    LaunchError if a key reference or the request log is unusable. The lifespan's end closes the request log.
    """
    return _Routes(get_backend, config, metrics or HttpMetrics()).application()


class _Routes:
    def __init__(self, get_backend: Callable[[], Backend], config: HttpConfig, metrics: HttpMetrics) -> None:
        self._get_backend = get_backend
        self._config = config
        self._metrics = metrics

    def application(self) -> FastAPI:
        app = Application(
            self._config,
            self._metrics,
            title="Sirocco",
            version=__version__,
            # A redirect would repeat the Host header.
            redirect_slashes=False,
            openapi_url=None,
            lifespan=_lifespan,
        )

        async def on_error(request: Request, error: Exception) -> Response:
            return app.on_error(request.scope[SCOPE_KEY], error)

        for kind in (ServeError, ClientGone, HTTPException, Exception):
            app.add_exception_handler(kind, on_error)
        app.post("/v1/chat/completions")(self.chat_completions)
        app.post("/v1/completions")(self.completions)
        app.get("/v1/models")(self.list_models)
        app.post("/v1/re_isq", status_code=202, openapi_extra=isq.DESCRIPTION)(self.re_isq)
        app.get("/v1/re_isq")(self.isq_state)
        app.post("/re_isq", openapi_extra=isq.DESCRIPTION)(self.re_isq_of_mistral)
        app.api_route("/health", methods=["GET", "HEAD"])(self.health)
        app.get("/metrics")(self.metrics)
        for path, methods in later_routes():
            app.api_route(path, methods=methods)(self.not_yet)
        app.get("/v1/models/{model_id:path}")(self.get_model)
        return app

    async def chat_completions(self, request: Request) -> Response:
        call, fields = await self._read(request)
        body = parse_request(ChatRequest, fields)
        refuse_in_chat(body)
        check_chat(body, self._config)
        backend = self._get_backend()
        card = resolve(body.model, await backend.models(), self._config)
        head = Head(
            "chat",
            f"chatcmpl-{call.id}",
            int(time.time()),
            card.id,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        prompt = chat_prompt(body, head.id, call.tenant)
        generation = Generation(call, head, [prompt], backend, self._config, self._metrics)
        return await (generation.stream if body.stream else generation.whole)(request.receive)

    async def completions(self, request: Request) -> Response:
        call, fields = await self._read(request)
        body = parse_request(CompletionRequest, fields)
        refuse_in_completion(body)
        check_completion(body, self._config)
        backend = self._get_backend()
        card = resolve(body.model, await backend.models(), self._config)
        head = Head(
            "completion",
            f"cmpl-{call.id}",
            int(time.time()),
            card.id,
            echo=bool(body.echo),
            top_logprobs=body.logprobs,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        prompts = completion_prompts(body, head.id, call.tenant)
        generation = Generation(call, head, prompts, backend, self._config, self._metrics)
        return await (generation.stream if body.stream else generation.whole)(request.receive)

    async def list_models(self) -> Response:
        cards = await self._get_backend().models()
        return _json({"object": "list", "data": [model_object(card) for card in cards]})

    async def get_model(self, model_id: str) -> Response:
        return _json(model_object(find_listed(model_id, await self._get_backend().models())))

    async def re_isq(self, request: Request) -> Response:
        return isq.job_response(await self._requantize(request))

    async def re_isq_of_mistral(self, request: Request) -> Response:
        """mistral.rs's answer is a sentence."""
        job = await self._requantize(request)
        if job.error is not None:
            raise job.error
        call: Call = request.scope[SCOPE_KEY]
        name = isq.wanted_type(parse_request(IsqRequest, call.body or {}))
        return Response(f"Re ISQ: {json.dumps(name, ensure_ascii=False)}", media_type="text/plain")

    async def isq_state(self) -> Response:
        return _json(isq.state_object(await self._get_backend().isq_state()))

    async def _requantize(self, request: Request) -> IsqJob:
        call, fields = await self._read(request)
        body = parse_request(IsqRequest, fields)
        name = isq.wanted_type(body)
        waits = isq.wants_to_wait(request.query_params.get("wait"))
        backend = self._get_backend()
        job = await backend.requantize(name, body.mode, body.target)
        call.outcome["re_isq"] = job.id
        return await backend.wait_for_isq(job.id) if waits else job

    async def health(self) -> Response:
        health = await self._get_backend().health()
        if health.is_ready:
            return _json({"status": "ok"})
        error = Unavailable(health.reason or "No target can answer yet.")
        body = {"status": "unavailable", "reason": error.message, **error_object(error)}
        return Response(json.dumps(body), error.status, headers=error_headers(error), media_type="application/json")

    async def metrics(self) -> Response:
        text = await self._get_backend().metrics()
        return Response(text, media_type="text/plain; version=0.0.4")

    async def not_yet(self, request: Request) -> Response:
        raise NotImplementedHere(f"{request.scope['path'][:200]} is not implemented yet.")

    async def _read(self, request: Request) -> tuple[Call, dict[str, Any]]:
        call: Call = request.scope[SCOPE_KEY]
        body = await read_json_body(request.scope, request.receive, self._config)
        call.body = parse_object(body, self._config.max_json_depth)
        return call, call.body


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    assert isinstance(app, Application)
    app.close()


def _json(value: dict[str, Any]) -> Response:
    return Response(json.dumps(value), media_type="application/json")
