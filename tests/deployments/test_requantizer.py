"""All targets change their weights or none does: several targets in this process, no Ray, switches over nothing."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from deployments import replica_switch, requantizer
from deployments.replica_switch import ReplicaSwitch
from deployments.requantizer import Requantizer, SwitchCalls
from deployments.switch_part import PartState, Wish, wished_source
from serve_app.errors import Conflict, EngineFailed, InvalidRequest, NotFound, Unavailable
from serve_app.metrics import HttpMetrics
from serve_app.options import IsqOptions, ModelSource
from tests.deployments.fakes import FakeSwitch


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


class Cluster(SwitchCalls):
    """Targets by name; `dead` ones raise as Ray does, and `mute` ones lose a command."""

    def __init__(self, count: int) -> None:
        self.switches = {f"t{i}": FakeSwitch() for i in range(count)}
        self.targets = {name: self.target(name) for name in self.switches}
        self.dead: set[str] = set()
        self.mute: dict[str, list[str]] = {}
        self.metrics = HttpMetrics()
        self.requantizer = self.ingress()

    def ingress(self) -> Requantizer:
        return Requantizer({"target": self}, self.metrics)

    def target(self, name: str, wish: Wish = Wish()) -> ReplicaSwitch:  # noqa: B008
        node_id = "node 1" if name == "t1" else "node 0"
        return ReplicaSwitch(self.switches[name], name, node_id, wish, self.latest)

    async def latest(self) -> Wish:
        wishes = [target.wish for name, target in self.targets.items() if name not in self.dead]
        return max([self.requantizer.wishes["target"], *wishes], key=lambda wish: wish.epoch)

    async def each(self, command: str, *args: Any) -> list[PartState | BaseException]:
        return [await self._one(name, command, *args) for name in self.targets]

    async def _one(self, name: str, command: str, *args: Any) -> PartState | BaseException:
        if name in self.dead:
            return ActorDiedError()
        if command in self.mute.get(name, ()):
            self.mute[name].remove(command)
            return TimeoutError()
        try:
            answer: PartState = await getattr(self.targets[name], command)(*args)
            return answer
        except Exception as error:
            return error

    @property
    def types(self) -> list[str]:
        return [switch.isq_type for name, switch in self.switches.items() if name not in self.dead]

    @property
    def steps(self) -> set[str]:
        return {target._step for name, target in self.targets.items() if name not in self.dead}


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(requantizer, "POLL_S", 0.005)
    monkeypatch.setattr(requantizer, "SILENCE_S", 0.2)
    monkeypatch.setattr(replica_switch, "LEASE_S", 0.3)
    cluster = Cluster(3)
    yield cluster
    cluster.requantizer.stop()
    for target in cluster.targets.values():
        target.stop()


async def run(cluster: Cluster, isq_type: str = "Q4_0", mode: Any = "drain") -> Any:
    job = await cluster.requantizer.begin(isq_type, mode, "target")
    return await cluster.requantizer.wait(job.id)


async def test_all_follow(cluster: Cluster) -> None:
    for switch in cluster.switches.values():
        switch.gates["prepare"].clear()
        switch.gates["switch"].clear()
    job = await cluster.requantizer.begin("Q4_0", "swap", "target")
    assert (job.state, job.replicas, job.from_type, job.in_place) == ("preparing", 3, "none", False)
    await until(lambda: job.progress == 0.25)
    cluster.switches["t0"].gates["prepare"].set()
    cluster.switches["t1"].gates["prepare"].set()
    await asyncio.sleep(0.05)
    assert all("switch swap" not in switch.calls for switch in cluster.switches.values()), "one is not prepared yet"
    cluster.switches["t2"].gates["prepare"].set()
    await until(lambda: job.state == "switching")
    for switch in cluster.switches.values():
        switch.gates["switch"].set()
    assert (await cluster.requantizer.wait(job.id)).state == "done"
    assert cluster.types == ["Q4_0"] * 3
    assert cluster.steps == {"idle"}
    assert all(s.calls == ["plan", "prepare", "switch swap", "settle"] for s in cluster.switches.values())
    assert cluster.requantizer.wishes["target"] == Wish(1, "Q4_0")
    assert {target.wish for target in cluster.targets.values()} == {Wish(1, "Q4_0")}
    assert cluster.metrics.snapshot()["sirocco_re_isq_jobs_total"] == {"done": [1.0]}
    assert job.progress == 1.0
    assert job.finished is not None
    assert (await run(cluster, "Q8_0")).state == "done"
    assert cluster.requantizer.wishes["target"] == Wish(2, "Q8_0")
    assert [job.isq_type for job in cluster.requantizer.jobs] == ["Q8_0", "Q4_0"]


async def test_those_on_one_node_share_its_memory(cluster: Cluster) -> None:
    await run(cluster)
    assert [switch.num_sharing for switch in cluster.switches.values()] == [2, 1, 2]
    del cluster.targets["t2"]
    await run(cluster, "Q8_0")
    assert [switch.num_sharing for switch in cluster.switches.values()] == [1, 1, 2]


@pytest.mark.parametrize("where", ["prepare", "switch"])
async def test_none_follows_where_one_fails(cluster: Cluster, where: str) -> None:
    cluster.switches["t1"].failures[where] = RuntimeError("no luck")
    job = await run(cluster, mode="swap")
    assert job.state == "failed"
    assert "no luck" in job.error.message
    assert cluster.types == ["none"] * 3
    assert cluster.steps == {"idle"}
    assert all(switch.calls[-1] == "undo" for switch in cluster.switches.values())
    assert cluster.metrics.isq_jobs == {"failed": 1}
    # A replica that starts now comes up with what the others serve.
    wish = await cluster.latest()
    assert wish.isq_type in (None, "none")
    assert (await run(cluster)).state == "done"
    assert cluster.types == ["Q4_0"] * 3
    assert (await cluster.latest()).isq_type == "Q4_0"


async def test_a_failure_is_told_as_it_was(cluster: Cluster) -> None:
    cluster.switches["t2"].failures["prepare"] = Conflict("too little memory")
    job = await run(cluster)
    assert isinstance(job.error, Conflict)


async def test_what_cannot_begin_is_refused_at_once(cluster: Cluster) -> None:
    begin = cluster.requantizer.begin
    with pytest.raises(InvalidRequest, match="Q4_0, Q8_0"):
        await begin("bogus", "drain", "target")
    with pytest.raises(NotFound, match="No draft model is configured") as caught:
        await begin("Q4_0", "drain", "draft")
    assert caught.value.param == "target"
    cluster.switches["t1"].failures["plan"] = Conflict("needs 7 bytes")
    with pytest.raises(Conflict, match="7 bytes"):
        await begin("Q4_0", "drain", "target")
    assert cluster.steps == {"idle"}
    assert not cluster.requantizer.jobs
    cluster.dead = set(cluster.targets)
    with pytest.raises(Unavailable):
        await begin("Q4_0", "drain", "target")


async def test_groups_have_jobs_and_wishes_of_their_own(cluster: Cluster) -> None:
    drafts = Cluster(1)
    requantizer = Requantizer({"target": cluster, "draft": drafts}, cluster.metrics)
    cluster.switches["t0"].gates["prepare"].clear()
    slow = await requantizer.begin("Q8_0", "drain", "target")
    for isq_type in ("Q4_0", "Q4_K"):
        job = await requantizer.begin(isq_type, "swap", "draft")
        assert (await requantizer.wait(job.id)).state == "done"
        assert (job.target, job.replicas) == ("draft", 1)
    assert drafts.types == ["Q4_K"]
    assert cluster.types == ["none"] * 3
    assert requantizer.wishes == {"target": Wish(), "draft": Wish(2, "Q4_K")}
    cluster.switches["t0"].gates["prepare"].set()
    assert (await requantizer.wait(slow.id)).state == "done"
    assert requantizer.wishes == {"target": Wish(1, "Q8_0"), "draft": Wish(2, "Q4_K")}
    assert [job.target for job in requantizer.jobs] == ["draft", "draft", "target"]
    drafts.dead = {"t0"}
    with pytest.raises(Unavailable):
        await requantizer.begin("Q4_0", "drain", "draft")


async def test_one_job_at_a_time_whoever_leads_it(cluster: Cluster) -> None:
    cluster.switches["t0"].gates["prepare"].clear()
    job = await cluster.requantizer.begin("Q4_0", "drain", "target")
    for ingress in (cluster.requantizer, cluster.ingress()):
        with pytest.raises(Conflict, match=f"Another job .*{job.id}"):
            await ingress.begin("Q8_0", "drain", "target")
    cluster.switches["t0"].gates["prepare"].set()
    assert (await cluster.requantizer.wait(job.id)).state == "done"
    assert cluster.types == ["Q4_0"] * 3


async def test_of_two_who_begin_at_once_at_most_one_wins(cluster: Cluster) -> None:
    other = cluster.ingress()
    answers = await asyncio.gather(
        cluster.requantizer.begin("Q4_0", "drain", "target"),
        other.begin("Q8_0", "drain", "target"),
        return_exceptions=True,
    )
    jobs = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(jobs) <= 1
    assert all(isinstance(answer, Conflict) for answer in answers if isinstance(answer, BaseException))
    for job in jobs:
        leader = cluster.requantizer if job in cluster.requantizer.jobs else other
        assert (await leader.wait(job.id)).state == "done"
    assert len(set(cluster.types)) == 1
    assert cluster.steps == {"idle"}


async def test_a_target_that_dies_while_it_prepares_ends_the_job(cluster: Cluster) -> None:
    cluster.switches["t1"].gates["prepare"].clear()
    job = await cluster.requantizer.begin("Q4_0", "drain", "target")
    await until(lambda: cluster.steps == {"prepared", "preparing"})
    cluster.dead.add("t1")
    await cluster.requantizer.wait(job.id)
    assert job.state == "failed"
    assert "t1 was lost" in job.error.message  # type: ignore[union-attr]
    assert cluster.types == ["none"] * 2
    assert cluster.steps == {"idle"}
    cluster.switches["t1"].gates["prepare"].set()


async def test_one_that_dies_while_it_switches_comes_back_with_the_new_type(cluster: Cluster) -> None:
    cluster.switches["t1"].gates["switch"].clear()
    job = await cluster.requantizer.begin("Q4_0", "drain", "target")
    await until(lambda: cluster.steps == {"switched", "switching"})
    assert job.state == "draining"
    cluster.dead.add("t1")
    assert (await cluster.latest()).isq_type == "Q4_0", "known before the job is over"
    assert (await cluster.requantizer.wait(job.id)).state == "done"
    assert cluster.types == ["Q4_0"] * 2
    cluster.switches["t1"].gates["switch"].set()


async def test_lost_commands_are_said_again(cluster: Cluster) -> None:
    cluster.mute = {"t0": ["start", "commit"], "t2": ["commit", "commit"]}
    assert (await run(cluster)).state == "done"
    assert cluster.types == ["Q4_0"] * 3


async def test_targets_give_up_when_the_ingress_is_gone(cluster: Cluster) -> None:
    cluster.switches["t0"].gates["prepare"].clear()
    job = await cluster.requantizer.begin("Q4_0", "drain", "target")
    await until(lambda: cluster.steps == {"prepared", "preparing"})
    # As SIGKILL would: nothing is told to anybody.
    cluster.requantizer._running[job.id].cancel()
    cluster.dead = set(cluster.targets)
    await asyncio.sleep(0.01)
    cluster.dead = set()
    await until(lambda: cluster.steps == {"idle"})
    assert cluster.types == ["none"] * 3
    assert all(switch.calls[-1] == "undo" for switch in cluster.switches.values())


async def test_a_commit_that_reached_some_reaches_the_others_by_them(cluster: Cluster) -> None:
    """The ingress dies in the midst of saying it: who was told goes on, and the others follow."""
    ingress = cluster.requantizer
    await cluster.each("reserve", "job", "Q4_0", {})
    await cluster.each("start", "job")
    await until(lambda: cluster.steps == {"prepared"})
    await cluster._one("t0", "commit", "job", "drain", Wish(1, "Q4_0"))
    assert ingress.wishes["target"] == Wish()
    # One that catches up has the weights a moment before it has the wish.
    await until(lambda: {target.wish for target in cluster.targets.values()} == {Wish(1, "Q4_0")})
    await until(lambda: cluster.steps == {"idle"})
    assert cluster.types == ["Q4_0"] * 3


async def test_what_failed_with_nobody_leading_is_no_wish_any_more(cluster: Cluster) -> None:
    cluster.switches["t0"].failures["switch"] = RuntimeError("no luck")
    target = cluster.targets["t0"]
    await target.reserve("job", "Q4_0", {})
    await target.start("job")
    await until(lambda: target._step == "prepared")
    await target.commit("job", "drain", Wish(1, "Q4_0"))
    assert await cluster.latest() == Wish(1, "Q4_0"), "who starts now would follow"
    await until(lambda: target._step == "idle")
    assert target.wish == Wish()


async def test_a_job_that_is_cancelled_while_it_is_planned(cluster: Cluster) -> None:
    switch, target = cluster.switches["t0"], cluster.targets["t0"]
    switch.gates["plan"].clear()
    reserving = asyncio.create_task(target.reserve("job", "Q4_0", {}))
    await until(lambda: switch.calls == ["plan"])
    await target.cancel("job", Wish())
    switch.gates["plan"].set()
    with pytest.raises(Conflict, match="given up"):
        await reserving
    assert (await run(cluster)).state == "done"


async def test_a_target_that_started_meanwhile_catches_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_switch, "CATCH_UP_S", (0.01, 0.05, 0.1))
    cluster.switches["t9"] = FakeSwitch()
    late = cluster.target("t9")
    assert (await run(cluster)).state == "done"
    cluster.targets["t9"] = late
    late.keep_catching_up()
    await until(lambda: cluster.types == ["Q4_0"] * 4)
    assert late.wish == Wish(1, "Q4_0")
    await until(lambda: late._step == "idle")
    assert cluster.switches["t9"].calls == ["plan", "prepare", "switch drain", "settle"]
    await asyncio.sleep(0.2)
    assert cluster.switches["t9"].calls.count("plan") == 1


async def test_in_place_always_drains(cluster: Cluster) -> None:
    cluster.switches["t1"].in_place = True
    job = await run(cluster, mode="swap")
    assert (job.state, job.in_place, job.mode) == ("done", True, "drain")
    assert all("switch drain" in switch.calls for switch in cluster.switches.values())


async def test_the_end_of_the_server_ends_the_job(cluster: Cluster) -> None:
    cluster.switches["t0"].gates["prepare"].clear()
    job = await cluster.requantizer.begin("Q4_0", "drain", "target")
    await until(lambda: cluster.steps == {"prepared", "preparing"})
    cluster.requantizer.stop()
    assert (await cluster.requantizer.wait(job.id)).state == "failed"
    assert isinstance(job.error, EngineFailed)
    assert cluster.steps == {"idle"}


async def test_an_engine_without_files_takes_no_part() -> None:
    target = ReplicaSwitch(None, "t", "node", Wish())
    with pytest.raises(Conflict, match="cannot be made anew"):
        await target.reserve("job", "Q4_0", {})
    assert (await target.state()).isq_type == "none"


def test_a_wish_changes_the_type_alone() -> None:
    source = ModelSource(model="m", isq=IsqOptions(type="Q4_K", imatrix="i.dat"))
    assert wished_source(source, Wish()) is source
    assert wished_source(source, Wish(2, "Q8_0")).isq == IsqOptions(type="Q8_0", imatrix="i.dat")
    assert wished_source(source, Wish(2, "none")).isq is None
    assert wished_source(ModelSource(), Wish(1, "Q8_0")).isq == IsqOptions(type="Q8_0")
