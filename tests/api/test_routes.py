"""The endpoints, through the official client over a real server, and directly over ASGI where that says as much."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_app.api.backend import Health, ModelCard
from serve_app.errors import ContextTooLong, EngineFailed, QueueFull, Unavailable
from serve_app.options import RequestSpeculation

STORY = "Once upon a time there was a “fox”\u2028 🦊."
HELLO: Any = [{"role": "user", "content": "Tell me a story."}]


def test_chat_answers_in_the_official_shape(serve, backend):
    answer = serve(backend).client().chat.completions.create(model="tiny", messages=HELLO)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", STORY, "length")
    usage: CompletionUsage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 11, 15)
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_streamed_chat_has_role_text_finish_and_nothing_else(serve, backend):
    chunks = list(serve(backend).client().chat.completions.create(model="tiny", messages=HELLO, stream=True))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    first, *texts, last = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert "".join(choice.delta.content for choice in texts) == STORY
    assert all(choice.finish_reason is None and choice.delta.role is None for choice in texts)
    assert (last.finish_reason, last.delta.content) == ("length", None)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_async_client_streams_with_usage_in_the_last_chunk_only(serve, backend):
    server = serve(backend)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        whole = await client.chat.completions.create(model="tiny", messages=HELLO)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


async def test_usage_is_null_on_the_chunks_before_and_absent_unless_asked(asgi, backend):
    client = asgi(backend)
    body = {"messages": "hi", "stream": True}
    events = _events((await client.post("/v1/chat/completions", json=body)).text)
    assert all("usage" not in event for event in events)
    body["stream_options"] = {"include_usage": True}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    *before, last = _events(response.text)
    assert all(event["usage"] is None for event in before)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_thirty_two_streams_at_once_each_get_their_story(serve, backend):
    client = serve(backend).client()

    def read(_: int) -> str:
        stream = client.completions.create(model="tiny", prompt="x", stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(read, range(32))) == {STORY}
    assert backend.num_live == 0


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_steps_of_several_tokens_read_like_steps_of_one(serve, backend, logprobs, n):
    """As they come from accepted proposals: one chunk for each step, with all of its tokens in it."""
    client = serve(backend).client()
    chat: Any = {"model": "tiny", "messages": HELLO, "n": n, "logprobs": logprobs}
    completion: Any = {"model": "tiny", "prompt": "x", "n": n} | ({"logprobs": 2} if logprobs else {})
    single = client.chat.completions.create(**chat).choices
    single_completion = client.completions.create(**completion).choices
    backend.tokens_per_step = 4
    whole = client.chat.completions.create(**chat)
    assert whole.choices == single
    assert client.completions.create(**completion).choices == single_completion

    chunks = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    assert chunks.pop().usage == whole.usage
    for number, choice in enumerate(single):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == number]
        texts = [part.delta.content for part in mine if part.delta.content]
        assert len(texts) == 3
        assert "".join(texts) == choice.message.content
        streamed = [entry for part in mine if part.logprobs for entry in part.logprobs.content]
        assert streamed == (choice.logprobs.content if logprobs else [])

    parts = [chunk.choices[0] for chunk in client.completions.create(**completion, stream=True)]
    for number, completed in enumerate(single_completion):
        mine = [part for part in parts if part.index == number]
        assert len(mine) == 3
        assert "".join(part.text for part in mine) == completed.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if logprobs else ():
            streamed = [value for part in mine for value in getattr(part.logprobs, name)]
            assert streamed == getattr(completed.logprobs, name)


def test_usage_tells_of_all_choices_which_proposals_were_accepted(serve, backend):
    client = serve(backend).client()
    details = client.chat.completions.create(model="tiny", messages=HELLO).usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 0)
    backend.tokens_per_step = 4
    whole = client.completions.create(model="tiny", prompt=["x", "y"], n=2)
    Completion.model_validate(whole.model_dump(), strict=True)
    details = whole.usage.completion_tokens_details
    assert whole.usage.completion_tokens == 44
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (4 * 8, 4 * 3)
    *_, last = client.completions.create(
        model="tiny", prompt=["x", "y"], n=2, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage == whole.usage


async def test_inter_token_times_count_every_token_of_a_step(asgi, backend):
    backend.tokens_per_step = 4
    client = asgi(backend)
    await client.post("/v1/completions", json={"prompt": "x"})
    text = (await client.get("/metrics")).text
    # The first step's four tokens are the first one's time.
    assert "sirocco_inter_token_latency_seconds_count 7.0" in text


def test_a_request_says_how_it_wants_to_be_speculated_on(serve, backend):
    client = serve(backend).client()
    for body in ({"enabled": False}, {"max_tokens": 3}):
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"speculative": body})
        client.completions.create(model="tiny", prompt="x", extra_body={"speculative": body})
    wishes = [prompt.sampling["speculation"] for prompt in backend.prompts]
    assert wishes == [RequestSpeculation(enabled=False)] * 2 + [RequestSpeculation(max_tokens=3)] * 2


def test_n_choices_are_told_apart(serve, backend):
    client = serve(backend).client()
    answer = client.chat.completions.create(model="tiny", messages=HELLO, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 33
    texts = {0: "", 1: "", 2: ""}
    roles = []
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, n=3, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
    assert set(texts.values()) == {STORY}
    assert sorted(roles) == [0, 1, 2]


def test_chat_logprobs_show_bytes_and_alternatives(serve, backend):
    client = serve(backend).client()
    answer = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=10)
    content = answer.choices[0].logprobs.content
    assert len(content) == 10
    assert (content[9].token, bytes(content[9].bytes).decode(), content[9].logprob) == (" 🦊", " 🦊", -0.5)
    assert [top.token for top in content[0].top_logprobs] == ["Once", " other"]
    chunks = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=10, stream=True
    )
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == content


def test_chat_logprobs_without_alternatives_is_an_empty_list(serve, backend):
    answer = serve(backend).client().chat.completions.create(model="tiny", messages=HELLO, logprobs=True)
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    assert serve(backend).client().chat.completions.create(model="tiny", messages=HELLO).choices[0].logprobs is None


@pytest.mark.parametrize("prompt", ["x", ["x", "y"], [5, 6, 7], [[5, 6], [7]]])
def test_completions_take_every_form_of_prompt(serve, backend, prompt):
    answer = serve(backend).client().completions.create(model="tiny", prompt=prompt, n=2)
    Completion.model_validate(answer.model_dump(), strict=True)
    prompts = prompt if isinstance(prompt[0], str | list) and not isinstance(prompt, str) else [prompt]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(prompts)))
    assert sorted((p.prompt for p in backend.prompts), key=str) == sorted(prompts, key=str)
    assert {choice.text for choice in answer.choices} == {STORY}
    assert answer.usage.completion_tokens == 11 * 2 * len(prompts)


def test_echo_repeats_the_prompt_before_the_text(serve, backend):
    client = serve(backend).client()
    answer = client.completions.create(model="tiny", prompt=["A.", "B."], echo=True, max_tokens=2)
    assert [choice.text for choice in answer.choices] == ["A.Once upon", "B.Once upon"]
    assert answer.choices[0].logprobs is None
    texts = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=["A.", "B."], echo=True, max_tokens=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["A.Once upon", "B.Once upon"]


@pytest.mark.parametrize("n", [1, 2])
def test_echo_with_logprobs_shows_the_prompts_tokens_too(serve, backend, n):
    client = serve(backend).client()
    request = {"model": "tiny", "prompt": "Say it", "echo": True, "logprobs": 2, "max_tokens": 2, "n": n}
    answer = client.completions.create(**request)
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert choice.text == "Say itOnce upon"
        assert logprobs.tokens == ["Say", " it", "Once", " upon"]
        assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
        assert logprobs.text_offset == [0, 3, 6, 10]
        assert logprobs.top_logprobs[0] is None
        assert logprobs.top_logprobs[3] == {" upon": -0.5, " other": -1.5}
    streamed: dict[int, dict[str, list[Any]]] = {}
    for chunk in client.completions.create(**request, stream=True):
        for name, values in chunk.choices[0].logprobs.model_dump().items():
            streamed.setdefault(chunk.choices[0].index, {}).setdefault(name, []).extend(values)
    assert streamed == {choice.index: choice.logprobs.model_dump() for choice in answer.choices}


def test_models_are_listed_and_found(serve, backend):
    client = serve(backend).client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "local"
    assert client.models.retrieve("default").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("no/such")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["tiny", "default", "gpt-4o"])
def test_any_name_means_the_single_model(serve, backend, name):
    answer = serve(backend).client().chat.completions.create(model=name, messages=HELLO)
    assert answer.model == "tiny"


def test_strict_model_name_knows_only_what_is_served(serve, backend):
    client = serve(backend, strict_model_name=True).client()
    assert client.chat.completions.create(model="default", messages=HELLO).model == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_of_two_models_an_unknown_name_means_none(serve, backend):
    backend.cards.append(ModelCard("other", 0, 64))
    client = serve(backend).client()
    assert client.chat.completions.create(model="other", messages=HELLO).model == "other"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=HELLO)


async def test_health_says_why_not(asgi, backend):
    client = asgi(backend, api_keys=("key",))
    assert (await client.get("/health")).status_code == 200
    assert (await client.head("/health")).status_code == 200
    backend.state = Health(False, "The model is loading.")
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["reason"] == "The model is loading."
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (QueueFull("Full.", retry_after_s=2.2), 429, "queue_full", "3"),
        (Unavailable("Lost."), 503, None, "1"),
        (ContextTooLong("Too long.", param="messages"), 400, "context_length_exceeded", None),
        (EngineFailed("Broke."), 500, "engine_failed", None),
        (ZeroDivisionError("secret detail"), 500, "internal_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_token_have_their_status(asgi, backend, error, status, code, retry_after, stream):
    backend.refusal = error
    response = await asgi(backend).post("/v1/chat/completions", json={"messages": "hi", "stream": stream})
    assert response.status_code == status
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["code"] == code
    assert body["param"] == getattr(error, "param", None)
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == retry_after


@pytest.mark.parametrize("error", [EngineFailed("The engine broke."), RuntimeError("secret detail")])
def test_an_error_in_midstream_is_an_event(serve, backend, error):
    backend.fail_after = (3, error)
    stream = serve(backend).client().chat.completions.create(model="tiny", messages=HELLO, stream=True)
    texts = []
    with pytest.raises(openai.APIError) as caught:
        texts.extend(chunk.choices[0].delta.content for chunk in stream)
    assert "".join(texts) == "Once upon a"
    assert "secret" not in str(caught.value)


async def test_a_stream_that_failed_has_no_done(asgi, backend):
    backend.fail_after = (1, Unavailable("The target was lost."))
    response = await asgi(backend).post("/v1/completions", json={"prompt": "x", "stream": True})
    last = _events(response.text)[-1]
    assert last["error"]["type"] == "service_unavailable_error"
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("reason", ["error", "abort"])
async def test_a_choice_that_ended_badly_is_an_error(asgi, backend, reason):
    backend.finish_reason = reason
    client = asgi(backend)
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code in (500, 503)
    streamed = await client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert "error" in _events(streamed.text)[-1]


async def test_one_failed_prompt_ends_its_siblings(asgi, backend):
    backend.fail_after = (4, EngineFailed("Broke."))
    response = await asgi(backend).post("/v1/completions", json={"prompt": ["a", "b", "c"]})
    assert response.status_code == 500
    assert backend.num_live == 0


async def test_metrics_count_requests_by_route_and_code(asgi, backend):
    client = asgi(backend)
    await client.post("/v1/chat/completions", json={"messages": "hi", "stream": True})
    await client.post("/v1/chat/completions", json={})
    await client.get("/nowhere/at/all")
    await client.get("/v1/models/unknown/one")
    text = (await client.get("/metrics")).text
    assert 'sirocco_requests_total{code="200",endpoint="/v1/chat/completions"} 1.0' in text
    assert 'sirocco_requests_total{code="400",endpoint="/v1/chat/completions"} 1.0' in text
    assert 'sirocco_requests_total{code="404",endpoint="other"} 1.0' in text
    assert 'sirocco_requests_total{code="404",endpoint="/v1/models/{model_id:path}"} 1.0' in text
    assert "sirocco_time_to_first_token_seconds_count 1.0" in text
    assert "sirocco_inter_token_latency_seconds_count 10.0" in text
    assert "nowhere" not in text
    assert "unknown" not in text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/images/generations",
        "/v1/embeddings",
        "/v1/audio/speech",
        "/v1/audio/transcriptions",
        "/v1/responses",
        "/v1/responses/resp_1/cancel",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/files",
        "/v1/batches",
        "/v1/moderations",
        "/v1/fine_tuning/jobs",
        "/v1/assistants",
        "/v1/threads/t/runs",
        "/v1/vector_stores",
        "/v1/load_lora_adapter",
        "/v1/models/unload",
    ],
)
async def test_what_comes_later_answers_501(asgi, backend, path):
    response = await asgi(backend).post(path, json={"model": "tiny"})
    assert response.status_code == 501
    assert response.json()["error"]["code"] == "not_implemented"


def test_the_official_client_understands_501(serve, backend):
    with pytest.raises(openai.APIStatusError) as error:
        serve(backend).client().embeddings.create(model="tiny", input="x")
    assert error.value.status_code == 501


async def test_wrong_routes_and_methods_are_answered_in_shape(asgi, backend):
    client = asgi(backend)
    for method, path, status in [("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)]:
        response = await client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert (await client.get("/v1/completions")).headers["allow"] == "POST"
    # A redirect to the path without its slash would be built from the Host header.
    assert (await client.get("/health/")).status_code == 404


async def test_nothing_is_left_running(asgi, backend):
    client = asgi(backend)
    for stream in (False, True):
        await client.post("/v1/chat/completions", json={"messages": "hi", "stream": stream})
    await asyncio.sleep(0.05)
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
    assert backend.http_metrics.in_flight == 0


def _events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
