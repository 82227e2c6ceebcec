"""Changes the type of the weights on all replicas of a group or on none: the ingress replica's side of replica_switch.

Two phases. First every one of them makes the new weights beside the old ones, which go on serving; one that cannot, or
is lost, ends the job. Then all exchange them. A replica that is lost now comes back with the new type, for the wish is
known; one that reports a failure has the others go back. Only then do the old weights go.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.call_errors import to_serve_error
from deployments.switch_part import NO_WISH, PartState, PartStep, Wish
from serve_app.api.backend import IsqJob, IsqMode
from serve_app.errors import Conflict, EngineFailed, InvalidRequest, NotFound, ServeError, Unavailable
from serve_app.metrics import HttpMetrics

log = logging.getLogger(__name__)

POLL_S = 0.1
# A replica that says nothing for this long is lost.
SILENCE_S = 20.0
KEPT_JOBS = 16


class SwitchCalls(Protocol):
    """The replicas that serve one model."""

    def each(self, command: str, *args: Any) -> Awaitable[list[PartState | BaseException]]:
        """Has every replica run a command of ReplicaSwitch; what each answered or raised."""


@dataclass(slots=True)
class _Party:
    """The replicas that take part in a job, and when each was last heard of."""

    calls: SwitchCalls
    job_id: str
    heard_s: dict[str, float]

    async def command(self, command: str, *args: Any) -> dict[str, PartState]:
        """Gives all a command; the states of those that take part, by replica."""
        answers = await self.calls.each(command, self.job_id, *args)
        now = time.monotonic()
        found = {a.replica_id: a for a in answers if isinstance(a, PartState) and a.replica_id in self.heard_s}
        self.heard_s.update(dict.fromkeys(found, now))
        return found

    @property
    def silent(self) -> list[str]:
        """The replicas that are lost."""
        end_s = time.monotonic() - SILENCE_S
        return [name for name, heard_s in self.heard_s.items() if heard_s < end_s]


class Requantizer:
    """The jobs that this ingress replica leads; made and used on its event loop. groups: by their names."""

    def __init__(self, groups: Mapping[str, SwitchCalls], metrics: HttpMetrics) -> None:
        self.wishes = dict.fromkeys(groups, NO_WISH)
        self.jobs: deque[IsqJob] = deque(maxlen=KEPT_JOBS)
        self._groups = groups
        self._metrics = metrics
        self._running: dict[str, asyncio.Task[None]] = {}

    async def begin(self, isq_type: str, mode: IsqMode, target: str) -> IsqJob:
        """See Backend.requantize."""
        calls = self._groups.get(target)
        if calls is None:
            raise NotFound(f"No {target} model is configured.", param="target")
        job_id = f"reisq-{uuid.uuid4().hex}"
        states = await calls.each("state")
        # Each of those on one node gets its share of that node's memory.
        num_on_nodes = Counter(state.node_id for state in states if isinstance(state, PartState))
        answers = await calls.each("reserve", job_id, isq_type, dict(num_on_nodes))
        parts = [answer for answer in answers if isinstance(answer, PartState)]
        errors = [answer for answer in answers if not isinstance(answer, PartState)]
        if errors or not parts:
            await calls.each("cancel", job_id, self._latest(target, parts))
            raise _worst(errors, target)
        first = parts[0]
        job = IsqJob(
            job_id,
            first.wanted_type or isq_type,
            first.isq_type,
            mode,
            target,
            int(time.time()),
            len(parts),
            in_place=any(part.in_place for part in parts),
        )
        if job.in_place:
            job.mode = "drain"
        self.jobs.appendleft(job)
        self.wishes[target] = self._latest(target, parts)
        party = _Party(calls, job_id, dict.fromkeys((part.replica_id for part in parts), time.monotonic()))
        task = asyncio.get_running_loop().create_task(self._run(job, party))
        self._running[job_id] = task
        task.add_done_callback(lambda done: self._running.pop(job_id, None))
        return job

    async def wait(self, job_id: str) -> IsqJob:
        """See Backend.wait_for_isq."""
        task = self._running.get(job_id)
        if task is not None:
            await asyncio.wait((task,))
        return next(job for job in self.jobs if job.id == job_id)

    def stop(self) -> None:
        """Ends the jobs; targets notice by themselves, or end as well."""
        for task in self._running.values():
            task.cancel()

    def _latest(self, group: str, parts: Sequence[PartState]) -> Wish:
        return max([self.wishes[group], *(part.wish for part in parts)], key=lambda wish: wish.epoch)

    async def _run(self, job: IsqJob, party: _Party) -> None:
        log.info("%s: %s weights go from %s to %s (%s)", job.id, job.target, job.from_type, job.isq_type, job.mode)
        before = self.wishes[job.target]
        try:
            await self._drive(job, party, ("reserved", "prepared"), ("start",), may_lose=False)
            job.state = "draining" if job.mode == "drain" else "switching"
            wish = self.wishes[job.target] = Wish(before.epoch + 1, job.isq_type)
            await self._drive(job, party, ("prepared", "switched"), ("commit", job.mode, wish), may_lose=True)
            await party.command("settle")
        except BaseException as error:
            await self._fail(job, party, before, error)
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        self._close(job, "done")
        log.info("%s: all of %d replicas have %s weights", job.id, len(party.heard_s), job.isq_type)

    async def _drive(
        self, job: IsqJob, party: _Party, steps: tuple[PartStep, PartStep], order: tuple[Any, ...], *, may_lose: bool
    ) -> None:
        """Has all replicas go from one step to the other by an order. Raises ServeError where one fails.

        may_lose: a replica that dies now does no harm, another one comes up with the wish.
        """
        start, end = steps
        while True:
            parts = await party.command("state")
            for part in parts.values():
                if part.job_id != job.id:
                    raise EngineFailed(f"The {job.target} {part.replica_id} has left the job.")
                if part.step == "failed":
                    raise part.error or EngineFailed(f"The {job.target} {part.replica_id} failed.")
            if parts:
                job.progress = min(part.progress for part in parts.values())
            for name in party.silent:
                if not may_lose:
                    raise EngineFailed(f"The {job.target} {name} was lost while the new weights were made.")
                del party.heard_s[name]
            if not party.heard_s:
                raise EngineFailed(f"Every {job.target} replica was lost.")
            if len(parts) == len(party.heard_s) and all(part.step == end for part in parts.values()):
                return
            # At first all are there; later those that the order did not reach.
            if any(part.step == start for part in parts.values()):
                await party.command(*order)
            else:
                await asyncio.sleep(POLL_S)

    async def _fail(self, job: IsqJob, party: _Party, before: Wish, error: BaseException) -> None:
        job.error = error if isinstance(error, ServeError) else EngineFailed("The server stopped the job.")
        log.warning("%s failed, %s weights go on serving: %s", job.id, job.from_type, job.error.message)
        wish = self.wishes[job.target]
        if wish != before:
            # Later than the wish of this job, which others may know by now.
            wish = self.wishes[job.target] = Wish(wish.epoch + 1, job.from_type)
        try:
            await party.command("cancel", wish)
        finally:
            self._close(job, "failed")

    def _close(self, job: IsqJob, state: Any) -> None:
        job.state = state
        job.finished = int(time.time())
        if state == "done":
            job.progress = 1.0
        self._metrics.isq_jobs[state] += 1


def _worst(errors: Sequence[BaseException], target: str) -> ServeError:
    """What the client is told of replicas that refuse: its own mistake first."""
    if not errors:
        return Unavailable(f"No {target} replica answers.", retry_after_s=5.0)
    mapped = [to_serve_error(error, retry_after_s=5.0) for error in errors]
    for kind in (InvalidRequest, Conflict):
        found = next((error for error in mapped if isinstance(error, kind)), None)
        if found is not None:
            return found
    return mapped[0]
