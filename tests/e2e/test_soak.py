"""Many requests of all kinds, with clients that leave, stop early or read slowly: nothing is lost, nothing leaks."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from tests.server_process import Server

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

PARALLEL = 24
ENDINGS = {"stop", "length"}


@dataclass
class Tally:
    """What became of the requests, and the server's memory as they went by."""

    outcomes: Counter[str] = field(default_factory=Counter)
    resident_mb: list[float] = field(default_factory=list)


def body(dice: random.Random) -> dict[str, object]:
    """A random request: chat or completion is chosen by which prompt field it has."""
    words = ["Once", "upon", "a", "time", "Lily", "the", "dog", "ran", "happy"]
    prompt = " ".join(dice.choices(words, k=dice.randint(1, 150)))
    fields: dict[str, object] = {
        "model": "default",
        "max_tokens": dice.choice([1, 5, 20, 60, 200]),
        "temperature": dice.choice([0, 0.7, 1.5]),
        "n": dice.choice([1, 1, 1, 2, 4]),
        "stream": dice.random() < 0.6,
    }
    if dice.random() < 0.3:
        fields["stop"] = dice.choice([["Lily"], [".", "!"], [" the", "xyz"]])
    if dice.random() < 0.2:
        fields["top_p"], fields["seed"] = 0.9, dice.randint(0, 9)
    if dice.random() < 0.2:
        fields["frequency_penalty"] = 0.5
    if dice.random() < 0.05:
        fields["max_tokens"] = -1
    if dice.random() < 0.5:
        return fields | {"prompt": prompt}
    return fields | {"messages": [{"role": "user", "content": prompt}]}


def endings(lines: list[str], fields: dict[str, object]) -> str:
    """How a stream that was read to its end has ended."""
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    if any("error" in event for event in events):
        return "error event"
    reasons = {c["index"]: c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]}
    assert lines[-1] == "data: [DONE]"
    assert len(reasons) == fields["n"]
    assert set(reasons.values()) <= ENDINGS
    return "finished"


async def one(client: httpx.AsyncClient, dice: random.Random) -> str:
    """Runs one request and says how it ended."""
    fields = body(dice)
    path = "/v1/completions" if "prompt" in fields else "/v1/chat/completions"
    manner = dice.choices(["reads", "leaves", "dawdles"], [6, 3, 1])[0]
    if manner == "leaves" and not fields["stream"]:
        try:
            await asyncio.wait_for(client.post(path, json=fields), dice.uniform(0.001, 0.3))
        except TimeoutError:
            return "left"
        return "finished"
    if not fields["stream"]:
        response = await client.post(path, json=fields)
        if response.status_code != 200:
            assert "error" in response.json()
            return str(response.status_code)
        choices = response.json()["choices"]
        assert len(choices) == fields["n"]
        assert {choice["finish_reason"] for choice in choices} <= ENDINGS
        return "finished"
    lines: list[str] = []
    leave_after = dice.randint(0, 30)
    async with client.stream("POST", path, json=fields) as response:
        if response.status_code != 200:
            await response.aread()
            return str(response.status_code)
        async for line in response.aiter_lines():
            lines += [line] if line else []
            if manner == "leaves" and len(lines) > leave_after:
                return "left"
            if manner == "dawdles":
                await asyncio.sleep(0.01)
    return endings(lines, fields)


def resident_mb(server: Server) -> float:
    """Resident memory of our replicas, all together."""
    total = 0
    for process in server.processes():
        if "ServeReplica" in " ".join(process.cmdline()):
            total += process.memory_info().rss
    return total / 2**20


def sockets(server: Server) -> int:
    """Open sockets between clients and the server's processes."""
    count = 0
    for process in server.processes():
        try:
            connections = process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        count += sum(c.laddr.port == server.port and c.status != psutil.CONN_LISTEN for c in connections)
    return count


async def storm(server: Server, total: int) -> Tally:
    """All requests, PARALLEL at a time; memory is read forty times on the way."""
    tally = Tally()
    queue = iter(range(total))

    async def worker() -> None:
        limits = httpx.Limits(max_keepalive_connections=2)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            for number in queue:
                tally.outcomes[await one(client, random.Random(number))] += 1
                if number % max(total // 40, 1) == 0:
                    tally.resident_mb.append(await asyncio.to_thread(resident_mb, server))

    await asyncio.gather(*(worker() for _ in range(PARALLEL)))
    return tally


def soak(total: int) -> Tally:
    server = Server("--max-seqs", "16", "--pa-ctxt-len", "4096", "--max-waiting", "64")
    try:
        server.wait()
        asyncio.run(storm(server, 48))
        server.until("sirocco_requests_in_flight", 1.0)
        tasks = server.metrics_of("sirocco_event_loop_tasks")
        tally = asyncio.run(storm(server, total))
        assert tally.outcomes.total() == total
        assert set(tally.outcomes) <= {"finished", "left", "400", "429"}, tally.outcomes
        assert tally.outcomes["finished"] > total * 0.5
        assert tally.outcomes["left"] > total * 0.05
        for name in ("requests_running", "requests_waiting", "requests_paused", "kv_blocks_used"):
            server.until(f"sirocco_{name}", 0.0)
        # The scrape itself is in flight while it counts.
        server.until("sirocco_requests_in_flight", 1.0)
        assert server.metrics_of("sirocco_event_loop_tasks") == pytest.approx(tasks, abs=2)
        assert sockets(server) <= 2
        assert server.end() == 0
    finally:
        server.kill()
    return tally


def test_a_short_storm() -> None:
    soak(300)


@pytest.mark.nightly
def test_two_thousand_requests() -> None:
    resident = soak(2000).resident_mb
    second_half = resident[len(resident) // 2 :]
    assert max(second_half) <= 1.05 * min(second_half), resident
