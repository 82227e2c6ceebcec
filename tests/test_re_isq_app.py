"""The type of the weights changes in the real application: two targets, an official client that streams meanwhile."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.server_process import Server

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server("--num-targets", "2")
    started.wait()
    # It answers as soon as one target can; a job counts those that are there when it begins, the other would follow it.
    end_s = time.monotonic() + 120
    while sum(types(started).values()) != 2.0:
        assert time.monotonic() < end_s, types(started)
        time.sleep(0.1)
    yield started
    started.kill()


def change(server: Server, isq_type: str, mode: str) -> Any:
    status, text = server.post("/v1/re_isq?wait=true", isq_type=isq_type, mode=mode)
    assert status == 200, text
    return json.loads(text)


def state(server: Server) -> Any:
    return json.loads(server.get("/v1/re_isq")[1])


def types(server: Server) -> dict[str, float]:
    return server.metrics_of("sirocco_isq_info")


def stream(client: openai.OpenAI, begun: threading.Semaphore | None = None) -> tuple[str, str | None]:
    """The text of a long answer, and why it ended."""
    text, reason = "", None
    chunks = client.completions.create(
        model="default", prompt="Once upon a time", max_tokens=120, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    for chunk in chunks:
        if begun is not None and not text:
            begun.release()
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason
    return text, reason


@pytest.mark.parametrize("mode", ["swap", "drain"])
def test_streams_go_on_while_all_targets_change(server: Server, mode: str) -> None:
    """The embedded model is Q8_0: made anew in that type it says the same, so no token may be missing or double."""
    client = server.client()
    expected = stream(client)
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(32) as pool:
        streams = [pool.submit(stream, client, begun) for _ in range(32)]
        for _ in range(16):
            assert begun.acquire(timeout=60)
        job = change(server, "Q8_0", mode)
        assert {future.result() for future in streams} == {expected}
    assert expected[1] == "length"
    assert (job["state"], job["isq_type"], job["replicas"], job["error"]) == ("done", "Q8_0", 2, None)
    assert state(server)["serving"] == ["Q8_0"]
    assert state(server)["data"][0] == job
    assert types(server) == {"Q8_0": 2.0}
    assert server.metric("sirocco_kv_blocks_used") == 0.0


def test_what_is_refused(server: Server) -> None:
    status, text = server.post("/v1/re_isq", isq_type="bogus")
    assert status == 400
    assert "Q4_K_M" in json.loads(text)["error"]["message"]
    status, text = server.post("/v1/re_isq", isq_type="Q4K", target="draft")
    assert (status, json.loads(text)["error"]["message"]) == (404, "No draft model is configured.")


@pytest.mark.nightly
def test_a_replica_that_is_replaced_comes_up_with_the_type(server: Server) -> None:
    status, text = server.post("/re_isq?wait=true", ggml_type="Q4_0")
    assert (status, text) == (200, 'Re ISQ: "Q4_0"')
    assert types(server) == {"Q4_0": 2.0}
    victim = next(process for process in server.processes() if "Target" in process.name())
    victim.kill()
    end_s = time.monotonic() + 120
    while types(server) != {"Q4_0": 2.0} or victim.is_running():
        assert set(types(server)) <= {"Q4_0"}
        assert time.monotonic() < end_s, types(server)
        time.sleep(0.2)
    assert stream(server.client())[1] == "length"
    assert state(server)["data"][0]["isq_type"] == "Q4_0"
    assert set(server.metrics_of("sirocco_re_isq_jobs_total")) == {"done"}
