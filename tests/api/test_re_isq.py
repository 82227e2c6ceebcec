"""The routes that change the type of the weights."""

import json

import openai
import pytest

from serve_app.api.backend import IsqState
from serve_app.api.isq import state_object
from serve_app.api.routes import build_asgi
from serve_app.config import HttpConfig
from serve_app.errors import Conflict, EngineFailed, InvalidRequest, NotFound, Unavailable


async def test_a_job_begins(asgi, backend):
    response = await asgi(backend).post("/v1/re_isq", json={"isq_type": "Q8_0"})
    assert response.status_code == 202
    assert response.json() == {
        "id": "reisq-0",
        "object": "re_isq.job",
        "state": "preparing",
        "isq_type": "Q8_0",
        "from_type": "none",
        "mode": "drain",
        "target": "target",
        "in_place": False,
        "progress": 0.0,
        "replicas": 1,
        "created": 1_700_000_000,
        "finished": None,
        "error": None,
    }


@pytest.mark.parametrize("flag", ["true", "1", "", "True"])
async def test_waiting_for_the_end(asgi, backend, flag):
    response = await asgi(backend).post(
        f"/v1/re_isq?wait={flag}", json={"isq_type": 4, "mode": "swap", "target": "target"}
    )
    assert response.status_code == 200
    job = response.json()
    assert (job["state"], job["isq_type"], job["mode"], job["progress"]) == ("done", "4", "swap", 1.0)


async def test_a_job_that_failed_has_the_status_of_its_error(asgi, backend):
    backend.isq_failure = EngineFailed("Out of luck.")
    response = await asgi(backend).post("/v1/re_isq?wait=true", json={"isq_type": "Q8_0"})
    assert response.status_code == 500
    assert response.json()["state"] == "failed"
    assert response.json()["error"] == {
        "message": "Out of luck.", "type": "server_error", "param": None, "code": "engine_failed"
    }  # fmt: skip


async def test_mistral_rs_form_and_answer(asgi, backend):
    client = asgi(backend)
    for path in ("/re_isq", "/re_isq?wait=true"):
        response = await client.post(path, json={"ggml_type": "Q4K"})
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain")
        assert response.text == 'Re ISQ: "Q4K"'
    assert [job.isq_type for job in backend.isq_jobs] == ["Q4K", "Q4K"]
    backend.isq_failure = EngineFailed("Out of luck.")
    response = await client.post("/re_isq?wait=true", json={"ggml_type": "Q4K"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")


async def test_either_name_of_the_field_is_taken_by_either_route(asgi, backend):
    client = asgi(backend)
    assert (await client.post("/v1/re_isq", json={"ggml_type": "Q4K"})).json()["isq_type"] == "Q4K"
    assert (await client.post("/re_isq", json={"isq_type": 8})).text == 'Re ISQ: "8"'
    assert (await client.post("/v1/re_isq", json={"isq_type": "8", "ggml_type": 8})).status_code == 202


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/re_isq", {}, "isq_type"),
        ("/v1/re_isq", {"isq_type": None}, "isq_type"),
        ("/v1/re_isq", {"isq_type": ["Q4K"]}, "isq_type"),
        ("/v1/re_isq", {"isq_type": True}, "isq_type"),
        ("/v1/re_isq", {"isq_type": "Q4K", "ggml_type": "Q8_0"}, "ggml_type"),
        ("/v1/re_isq", {"isq_type": "Q4K", "mode": "now"}, "mode"),
        ("/v1/re_isq", {"isq_type": "Q4K", "target": "both"}, "target"),
        ("/v1/re_isq?wait=maybe", {"isq_type": "Q4K"}, "wait"),
        ("/re_isq", {"ggml_type": 1.5}, "ggml_type"),
    ],
)
async def test_what_is_wrong_with_a_request(asgi, backend, path, body, param):
    response = await asgi(backend).post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not backend.isq_jobs


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("There are Q4_0, Q8_0.", param="isq_type"), 400),
        (NotFound("No draft model is configured.", param="target"), 404),
        (Conflict("Another job changes the weights already."), 409),
        (Unavailable("No target replica answers.", retry_after_s=5), 503),
    ],
)
async def test_refusals_keep_openais_shape(asgi, backend, error, status):
    backend.refusal = error
    for path, field in (("/v1/re_isq", "isq_type"), ("/re_isq", "ggml_type")):
        response = await asgi(backend).post(path, json={field: "Q8_0", "target": "draft"})
        assert response.status_code == status
        assert response.json()["error"]["message"] == error.message


def test_the_official_client_understands_409(serve, backend):
    backend.refusal = Conflict("Another job changes the weights already.")
    with pytest.raises(openai.ConflictError, match="Another job"):
        serve(backend).client().post("/re_isq", body={"isq_type": "Q8_0"}, cast_to=object)


def test_a_draft_models_types_are_told_where_there_is_one():
    assert state_object(IsqState(["Q4_K"], [], ["Q8_0"])) == {
        "object": "list", "serving": ["Q4_K"], "serving_draft": ["Q8_0"], "data": []
    }  # fmt: skip
    assert state_object(IsqState(["Q4_K"], [], []))["serving_draft"] == []


async def test_jobs_are_listed_the_newest_first(asgi, backend):
    client = asgi(backend)
    assert (await client.get("/v1/re_isq")).json() == {"object": "list", "serving": ["none"], "data": []}
    await client.post("/v1/re_isq?wait=true", json={"isq_type": "Q4K"})
    await client.post("/v1/re_isq", json={"isq_type": "Q8_0"})
    state = (await client.get("/v1/re_isq")).json()
    assert state["serving"] == ["Q4K"]
    assert [(job["isq_type"], job["state"]) for job in state["data"]] == [("Q8_0", "preparing"), ("Q4K", "done")]


async def test_keys_are_asked_for(asgi, backend):
    client = asgi(backend, api_keys=("secret",))
    for method, path in (("POST", "/v1/re_isq"), ("GET", "/v1/re_isq"), ("POST", "/re_isq")):
        assert (await client.request(method, path, json={"isq_type": "Q8_0"})).status_code == 401
    assert not backend.isq_jobs
    headers = {"authorization": "Bearer secret"}
    assert (await client.post("/v1/re_isq", json={"isq_type": "Q8_0"}, headers=headers)).status_code == 202


async def test_requests_are_logged_and_counted(asgi, backend, tmp_path):
    log = tmp_path / "requests.jsonl"
    app = build_asgi(lambda: backend, HttpConfig(request_logging_file=str(log)), metrics=backend.http_metrics)
    import httpx

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.post("/v1/re_isq", json={"isq_type": "Q8_0"})
        text = (await client.get("/metrics")).text
    app.close()
    assert 'sirocco_requests_total{code="202",endpoint="/v1/re_isq"} 1.0' in text
    (record,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (record["endpoint"], record["code"], record["re_isq"]) == ("/v1/re_isq", 202, "reisq-0")
    assert record["request"] == {"isq_type": "Q8_0"}


def test_the_schema_describes_them(backend):
    paths = build_asgi(lambda: backend, HttpConfig()).openapi()["paths"]
    assert set(paths["/v1/re_isq"]) == {"get", "post"}
    for path in ("/v1/re_isq", "/re_isq"):
        post = paths[path]["post"]
        assert [p["name"] for p in post["parameters"]] == ["wait"]
        body = post["requestBody"]["content"]["application/json"]["schema"]
        assert set(body["properties"]) == {"isq_type", "ggml_type", "mode", "target"}
        assert body["properties"]["mode"]["enum"] == ["drain", "swap"]
    assert "202" in paths["/v1/re_isq"]["post"]["responses"]
