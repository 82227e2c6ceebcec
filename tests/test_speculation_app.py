"""Speculation in the real application: draft and target in processes of their own, and a draft that is killed."""

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.server_process import Server

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

MODELS = Path(__file__).parent / "data" / "models"
OFF = {"enabled": False}
RESTART_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    target, draft = MODELS / "stories260K" / "stories260K-F32.gguf", MODELS / "stories40K-draft" / "hf"
    started = Server(
        "speculative", "-m", str(target), "-d", str(draft), "-n", "4", "--speculation", "draft", "--fixed-draft-tokens",
        "--draft-sampling", "sampled",
    )  # fmt: skip
    yield started.wait()
    started.kill()


def ask(client: openai.OpenAI, number: int, **body: Any) -> Any:
    return client.completions.create(
        model="default", prompt=f"Once upon a time {number}", max_tokens=120, seed=number,
        temperature=number % 2 * 0.9, extra_body={"ignore_eos": True, **body},
    )  # fmt: skip


def until_drafted(client: openai.OpenAI) -> None:
    """Until the way to the draft is open."""
    end_s = time.monotonic() + RESTART_S
    while ask(client, 1).usage.completion_tokens_details.accepted_prediction_tokens < 10:
        assert time.monotonic() < end_s
        time.sleep(0.1)


def state(server: Server) -> Any:
    return json.loads(server.get("/v1/re_isq")[1])


def process(server: Server, name: str) -> psutil.Process | None:
    return next((p for p in server.processes() if name in p.name()), None)


def test_another_process_drafts_and_the_text_stays(server: Server) -> None:
    client = server.client()
    until_drafted(client)
    draft, target = process(server, "Draft"), process(server, "Target")
    assert draft is not None
    assert target is not None
    assert draft.pid != target.pid
    # They do not wait for whatever else runs on this machine.
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in (draft.pid, target.pid)] == [mine, mine]
    for number in range(4):
        plain, drafted = ask(client, number, speculative=OFF), ask(client, number)
        assert plain.choices[0].text == drafted.choices[0].text
        assert plain.usage.completion_tokens == drafted.usage.completion_tokens == 120
        details = drafted.usage.completion_tokens_details
        assert details.accepted_prediction_tokens > 20
        assert details.rejected_prediction_tokens > 0
        assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0
        most_one = ask(client, number, speculative={"max_tokens": 1})
        assert most_one.choices[0].text == plain.choices[0].text
    assert server.metrics_of("sirocco_speculation_accepted_tokens_total")["draft"] > 100
    assert server.metrics_of("sirocco_speculation_accepted_by_position_total").keys() == {"1", "2", "3", "4"}
    assert server.metric("sirocco_speculation_exchange_seconds_count") > 20
    assert 0 < server.metric("sirocco_speculation_exchange_seconds_sum") < 60
    assert server.metric("sirocco_draft_forwards_total") > 20
    assert server.metric("sirocco_draft_kv_blocks_total") > server.metric("sirocco_draft_kv_blocks_used") >= 0
    assert server.metric("sirocco_draft_evictions_total") >= 0
    assert server.metrics_of("sirocco_draft_isq_info") == {"none": 1.0}
    assert server.metrics_of("sirocco_process_resident_bytes")["Draft"] > 2**20


def test_the_drafts_weights_change_under_streams(server: Server) -> None:
    """Not a text changes, the draft is of use afterwards, and the target's weights are no part of it."""
    client = server.client()
    until_drafted(client)
    expected = {number: ask(client, number, speculative=OFF).choices[0].text for number in range(6)}
    is_over = threading.Event()

    def stream(number: int) -> int:
        count = 0
        while not is_over.is_set():
            assert ask(client, number).choices[0].text == expected[number]
            count += 1
        return count

    served = state(server)["serving"]
    for isq_type, mode in (("Q4_0", "swap"), ("Q8_0", "drain")):
        is_over.clear()
        with ThreadPoolExecutor(6) as pool:
            streams = [pool.submit(stream, number) for number in range(6)]
            try:
                time.sleep(0.3)
                status, text = server.post("/v1/re_isq?wait=true", isq_type=isq_type, mode=mode, target="draft")
            finally:
                is_over.set()
            assert all(one.result() > 0 for one in streams)
        job = json.loads(text)
        assert (status, job["state"], job["isq_type"], job["target"]) == (200, "done", isq_type, "draft"), text
        now = state(server)
        assert (now["serving"], now["serving_draft"]) == (served, [isq_type])
        assert now["data"][0] == job
        assert server.metrics_of("sirocco_draft_isq_info") == {isq_type: 1.0}
        assert server.metrics_of("sirocco_isq_info") == {"none": 1.0}
        until_drafted(client)
    victim = process(server, "Draft")
    assert victim is not None
    victim.kill()
    victim.wait(10)
    until_drafted(client)
    assert state(server)["serving_draft"] == ["Q8_0"], "another replica has the latest type"
    status, text = server.post("/v1/re_isq", isq_type="bogus", target="draft")
    assert status == 400
    assert "Q4_K_M" in json.loads(text)["error"]["message"]


def test_requests_without_a_seed_have_sampled_drafts(server: Server) -> None:
    client = server.client()
    until_drafted(client)
    accepted = 0
    for number in range(4):
        said = client.completions.create(
            model="default", prompt=f"Once upon a time {number}", max_tokens=120, temperature=1.0, n=2, logprobs=1,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert [len(choice.logprobs.tokens) for choice in said.choices] == [120, 120]
        assert said.choices[0].text != said.choices[1].text
        accepted += said.usage.completion_tokens_details.accepted_prediction_tokens
    # About half of the tokens; of greedy drafts a third.
    assert accepted > 300


@pytest.mark.parametrize("num_kills", [10, pytest.param(200, marks=pytest.mark.nightly)])
def test_a_draft_that_is_killed_again_and_again(server: Server, num_kills: int) -> None:
    client, chance = server.client(), random.Random(num_kills)
    until_drafted(client)
    expected = {number: ask(client, number, speculative=OFF).choices[0].text for number in range(16)}
    is_over = threading.Event()

    def stream(number: int) -> int:
        """Asks the same again and again, every other time without the seed; how often."""
        count = 0
        while not is_over.is_set():
            assert ask(client, number).choices[0].text == expected[number]
            assert ask(client, number, seed=None).usage.completion_tokens == 120
            count += 1
        return count

    killed = set()
    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(stream, number) for number in range(16)]
        try:
            while len(killed) < num_kills and not any(one.done() for one in streams):
                time.sleep(chance.uniform(0.05, 1.0))
                victim = process(server, "Draft")
                if victim is not None:
                    victim.kill()
                    killed.add(victim.pid)
        finally:
            is_over.set()
        assert all(one.result() > 0 for one in streams)
    assert len(killed) == num_kills
    until_drafted(client)
    assert server.metric("sirocco_kv_blocks_used") == 0.0
