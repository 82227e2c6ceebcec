"""A replica's part in a change of weights: it does what an ingress replica says, and gives up when it falls silent."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any, Literal, TypeVar

from deployments.switch_part import PartState, PartStep, Wish
from serve_app.engine.weight_switch import Mode, SwitchPlan, WeightSwitch
from serve_app.errors import Conflict, EngineFailed, ServeError

log = logging.getLogger(__name__)

T = TypeVar("T")

# A job whose ingress is not heard of for this long is over.
LEASE_S = 30.0
# When a replica that has just started looks whether a job ended meanwhile, in seconds after each other.
CATCH_UP_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_OWN = "catches up"

SwitchCommand = Literal["state", "reserve", "start", "commit", "settle", "cancel"]
AskWish = Callable[[], Awaitable[Wish]]


class ReplicaSwitch:
    """The commands reserve, start, commit, settle and cancel, and state; made and used on one event loop.

    Every command answers with the state. One that names another job than the replica's changes nothing. A command comes
    back at once; start and commit begin something whose end the state tells.
    """

    def __init__(
        self,
        switch: WeightSwitch | None,
        replica_id: str,
        node_id: str,
        wish: Wish,
        ask_wish: AskWish | None = None,
    ) -> None:
        """ask_wish: for the latest wish that any replica knows."""
        # Differs from the wish while weights are exchanged: where that fails and nobody leads, it holds again.
        self._wish_before = self.wish = wish
        self._switch = switch
        self._replica_id = replica_id
        self._node_id = node_id
        self._ask_wish = ask_wish
        self._job_id: str | None = None
        self._plan: SwitchPlan | None = None
        self._step: PartStep = "idle"
        self._progress = 0.0
        self._error: ServeError | None = None
        self._heard_s = 0.0
        self._work: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def isq_type(self) -> str:
        """Of the weights in use."""
        return "none" if self._switch is None else self._switch.isq_type

    async def run(self, command: SwitchCommand, *args: Any) -> PartState:
        """One of the commands, by its name."""
        method: Callable[..., Awaitable[PartState]] = getattr(self, command)
        return await method(*args)

    async def state(self, job_id: str | None = None) -> PartState:
        """job_id: of who asks because it leads that job."""
        self._hear(job_id)
        plan, is_mine = self._plan, self._job_id is not None
        return PartState(
            self._replica_id,
            self._node_id,
            self.isq_type,
            self.wish,
            self._job_id,
            self._step,
            plan.isq_type if plan is not None and is_mine else None,
            plan.in_place if plan is not None and is_mine else False,
            self._progress,
            self._error,
        )

    async def reserve(self, job_id: str, isq_type: str, num_on_nodes: Mapping[str, int]) -> PartState:
        """Takes part in a job. num_on_nodes: how many do so, by node.

        Raises InvalidRequest and Conflict, as WeightSwitch.plan, and Conflict where there is another job."""
        if self._switch is None:
            raise Conflict("The weights of this replica cannot be made anew.")
        if self._job_id is not None:
            raise Conflict(f"Another job changes the weights already: {self._job_id}.")
        self._job_id, self._error, self._progress = job_id, None, 0.0
        self._heard_s = time.monotonic()
        num_sharing = num_on_nodes.get(self._node_id, 1)
        try:
            plan = await in_thread(lambda: self._weights.plan(isq_type, num_sharing))
        except BaseException:
            if self._job_id == job_id:
                self._end()
            raise
        if self._job_id != job_id:
            raise Conflict(f"The job {job_id} was given up while its weights were planned.")
        self._plan, self._step = plan, "reserved"
        self._keep(self._watch(job_id))
        return await self.state(job_id)

    async def start(self, job_id: str) -> PartState:
        """Begins to make the new weights."""
        if self._is_at(job_id, "reserved"):
            self._begin("preparing", "prepared", self._prepare)
        return await self.state(job_id)

    async def commit(self, job_id: str, mode: Mode, wish: Wish) -> PartState:
        """Begins to exchange the weights; from here on the wish holds for replicas that ask this one."""
        if self._is_at(job_id, "prepared"):
            self._wish_before, self.wish = self.wish, wish
            self._begin("switching", "switched", lambda: self._weights.switch(mode))
        return await self.state(job_id)

    async def settle(self, job_id: str) -> PartState:
        """The job is done: the old weights go."""
        if self._is_at(job_id, "switched"):
            await in_thread(self._weights.settle)
            self._end()
        return await self.state()

    async def cancel(self, job_id: str, wish: Wish) -> PartState:
        """The job is over, whatever was done of it is undone; comes back when the old weights serve."""
        if job_id == self._job_id:
            await self._undo(wish)
        return await self.state()

    async def catch_up(self) -> None:
        """Serves the latest wish, if that came while this replica was starting."""
        assert self._ask_wish is not None
        wish = await self._ask_wish()
        if wish.epoch <= self.wish.epoch or self._job_id is not None or self._switch is None or wish.isq_type is None:
            return
        log.info("the other replicas serve %s weights: this one follows", wish.isq_type)
        isq_type = wish.isq_type
        self._job_id = _OWN
        try:
            plan = await in_thread(lambda: self._weights.plan(isq_type))
            for part in (lambda: self._weights.prepare(plan, lambda done: None), lambda: self._weights.switch("drain")):
                await in_thread(part)
            self.wish = wish
            await in_thread(self._weights.settle)
        except Exception:
            log.exception("the weights could not be changed to %s", isq_type)
            await in_thread(self._weights.undo)
        finally:
            self._end()

    def keep_catching_up(self) -> None:
        """Looks for a new wish a few times: a job that began before this replica started knows nothing of it."""

        async def look() -> None:
            for pause_s in CATCH_UP_S:
                await asyncio.sleep(pause_s)
                await self.catch_up()

        self._keep(look())

    @property
    def _weights(self) -> WeightSwitch:
        assert self._switch is not None
        return self._switch

    def _prepare(self) -> None:
        assert self._plan is not None
        self._weights.prepare(self._plan, self._note)

    def _note(self, done: float) -> None:
        self._progress = done

    def _begin(self, during: PartStep, after: PartStep, work: Callable[[], None]) -> None:
        async def run() -> None:
            try:
                await in_thread(work)
            except ServeError as error:
                self._fail(error)
            except CancelledError:
                self._fail(EngineFailed("it was cancelled"))
            except Exception as error:
                log.exception("the change of weights failed while it was %s", during)
                self._fail(EngineFailed(f"{type(error).__name__}: {error}"))
            else:
                self._step = after

        self._step = during
        self._work = self._keep(run())

    def _fail(self, error: ServeError) -> None:
        self._step, self._error = "failed", error

    async def _undo(self, wish: Wish) -> None:
        self._weights.stop()
        if self._work is not None:
            await asyncio.wait((self._work,))
        try:
            await in_thread(self._weights.undo)
        finally:
            self.wish = wish
            self._end()

    async def _watch(self, job_id: str) -> None:
        """Ends the job whose leader is gone: what is not switched is dropped, what is stays."""
        while self._job_id == job_id:
            await asyncio.sleep(LEASE_S / 10)
            if self._job_id != job_id or time.monotonic() - self._heard_s < LEASE_S:
                continue
            log.warning("the job %s is given up: nobody asks for it any more", job_id)
            if self._step == "switching" and self._work is not None:
                await asyncio.wait((self._work,))
            if self._step == "switched":
                await self.settle(job_id)
            else:
                await self._undo(self._wish_before)
            if self._ask_wish is not None:
                await self.catch_up()

    def _hear(self, job_id: str | None) -> None:
        if job_id is not None and job_id == self._job_id:
            self._heard_s = time.monotonic()

    def _is_at(self, job_id: str, step: PartStep) -> bool:
        return job_id == self._job_id and self._step == step

    def _end(self) -> None:
        self._job_id = self._plan = self._work = None
        self._step = "idle"
        self._wish_before = self.wish

    def _keep(self, work: Any) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def stop(self) -> None:
        """Ends whatever is going on; the replica is about to stop."""
        if self._switch is not None and self._job_id is not None:
            self._switch.stop()
        for task in self._tasks:
            task.cancel()


async def in_thread(work: Callable[[], T]) -> T:
    """What work() returns or raises, from a thread that does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def finish(value: Any, error: BaseException | None) -> None:
        if result.done():
            return
        if error is None:
            result.set_result(value)
        else:
            result.set_exception(error)

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(finish, value, error)

    threading.Thread(target=run, name="re-isq", daemon=True).start()
    return await result
