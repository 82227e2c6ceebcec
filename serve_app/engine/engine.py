"""The engine: takes requests from any thread, steps on its own, hands out what each step brought."""

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from serve_app.engine.border import Border
from serve_app.engine.engine_parts import EngineParts, Pending
from serve_app.engine.model_runner import StepResult
from serve_app.engine.request import UNKNOWN, Request, RequestState
from serve_app.engine.scheduler import Schedule
from serve_app.engine.speculation.proposer import Proposer
from serve_app.engine.speculation.speculation import Speculation
from serve_app.engine.speculation.step_timer import StepTimer
from serve_app.engine.stats import EngineStats
from serve_app.engine.throughput import DrainRate
from serve_app.engine.weight_switch import WeightSwitch
from serve_app.errors import EngineFailed, QueueFull, ServeError, Unavailable
from serve_app.messages import FinishReason, GenerateRequest, TokenDelta
from serve_app.options import EngineConfig, SpeculationOptions

log = logging.getLogger(__name__)

# An engine whose steps fail this often in a row is beyond help: it reports itself as failed.
MAX_FAILURES_IN_A_ROW = 3
EXPIRY_CHECK_S = 0.25


OnDeltas = Callable[[list[TokenDelta]], None]


@dataclass(slots=True)
class _Launched:
    """A step that the runner has begun: what it computes, for whom it draws tokens, where its results come from, when
    it was begun (time.perf_counter)."""

    schedule: Schedule
    sampled: list[Request]
    wanted: list[tuple[int, range]]
    pending: Pending
    began_s: float


class Engine:
    """Continuous batching over one model.

    add, abort, pause, resume and stats may be called from any thread; step only from one: the engine's own after
    start(), or the caller's. on_deltas is called on the stepping thread, once a step, with everything it brought.

    Where the runner overlaps, the device has a step to do at all times: each step is given to it before the tokens of
    the one before are known, and these are looked at while it runs. A request that turns out to have ended is then in
    one step too many, whose token is dropped; what that step writes into blocks that are free by now comes before
    anything that a later step writes there.
    """

    def __init__(self, parts: EngineParts, config: EngineConfig, on_deltas: OnDeltas) -> None:
        self.parts = parts
        self.config = config
        self.is_failed = False
        self._scheduler = parts.scheduler
        self._on_deltas = on_deltas
        # What the last step brought: handed on while a draft works on the next one, or before it.
        self._brought: list[TokenDelta] = []
        self._inbox: deque[Callable[[list[TokenDelta]], None]] = deque()
        # Requests put into the inbox, and taken out of it: each counted on one side only, so neither count is lost.
        self._num_sent = self._num_taken = 0
        self._sending = threading.Lock()
        self._wake = threading.Event()
        self.border = Border(self._scheduler, self._wake)
        # Of an engine that was built from a model's files.
        self.switch: WeightSwitch | None = None
        self._speculation: Speculation | None = None
        self._last_step_ended_s = 0.0
        self._live: dict[str, list[Request]] = {}
        # Begun, not yet looked at; one where the runner overlaps, and else none between two steps.
        self._under_way: deque[_Launched] = deque()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._is_idle = True
        self._steps = self._failures = 0
        self._drain = DrainRate()
        self._next_expiry_check_s = 0.0

    # -- from any thread ------------------------------------------------------------------------------------------

    def add(self, source: GenerateRequest) -> None:
        """Queues a request. Raises ContextTooLong, InvalidRequest, QueueFull, or Unavailable when it is stopping."""
        if self._is_stopping or self.is_failed:
            raise Unavailable("the engine is shutting down" if self._is_stopping else "the engine has failed")
        choices = self.parts.factory.make(source)
        with self._sending:
            num_waiting = self._num_waiting
            if num_waiting >= self.config.max_waiting:
                raise QueueFull(
                    f"{num_waiting} requests are waiting already, the limit is {self.config.max_waiting}",
                    retry_after_s=self._drain.time_to_drain_s(num_waiting + 1),
                )
            self._num_sent += 1
            self._post(lambda deltas: self._add(choices))

    def abort(self, request_id: str) -> None:
        """Ends a request, if it still lives, before the next step; its blocks are free then."""
        self._post(lambda deltas: self._abort(request_id, deltas))

    def pause(self, request_id: str) -> None:
        """Leaves a request out of the coming steps, for a client that does not keep up; it keeps its blocks."""
        self._post(lambda deltas: self._set_paused(request_id, True))

    def resume(self, request_id: str) -> None:
        """Undoes pause."""
        self._post(lambda deltas: self._set_paused(request_id, False))

    def abort_all(self) -> None:
        """Aborts what lives, in the caller's thread; only while the engine's own does not run."""
        assert self._thread is None
        deltas = self._take_inbox()
        for choices in list(self._live.values()):
            self._end(choices, "abort", None, deltas)

    def stats(self) -> EngineStats:
        """Counters and state; every number by itself is exact, they may stem from neighbouring steps."""
        scheduler, collector = self._scheduler, self.parts.collector
        num_waiting = self._num_waiting
        return EngineStats(
            max_seqs=self.config.max_seqs,
            num_running=len(scheduler.running),
            num_waiting=num_waiting,
            num_paused=sum(r.is_paused for r in list(scheduler.running)),
            blocks_total=scheduler.pool.num_total,
            blocks_free=scheduler.pool.num_free,
            steps=self._steps,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            output_tokens=collector.num_output_tokens,
            prefix_lookups=scheduler.prefix_lookups,
            prefix_hits=scheduler.prefix_hits,
            evictions=scheduler.pool.num_evictions,
            estimated_wait_s=self._drain.time_to_drain_s(num_waiting + 1),
            is_failed=self.is_failed,
            speculation=None if self._speculation is None else self._speculation.counts(),
        )

    @property
    def _num_waiting(self) -> int:
        return len(self._scheduler.waiting) + self._num_sent - self._num_taken

    def speculate(self, options: SpeculationOptions, draft: Proposer | None = None) -> None:
        """From here on tokens are proposed, and steps verify them; before anything runs. draft: see Speculation."""
        assert self._thread is None
        assert not self._live
        if options.use != "off":
            self._speculation = Speculation(
                options, self._scheduler.chunk_tokens, self.config.max_batched_tokens, draft
            )
            if not options.is_fixed:
                self._speculation.warm_up(StepTimer(self.parts), self.config.max_seqs)

    def start(self) -> None:
        """Starts the engine's thread."""
        assert self._thread is None
        # Model and tables live as long as the process: without this every full collection walks them.
        gc.collect()
        gc.freeze()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_stopped(self) -> bool:
        """Whether stop() was called."""
        return self._is_stopping

    def stop(self) -> None:
        """Ends all requests with an error, the thread, and frees model and cache."""
        self._is_stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._under_way.clear()
        deltas = self._fail_all(Unavailable("the server is shutting down"))
        if deltas:
            self._on_deltas(deltas)
        self.parts.close()

    def _post(self, action: Callable[[list[TokenDelta]], None]) -> None:
        self._inbox.append(action)
        self._wake.set()

    # -- on the stepping thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_stopping:
            deltas = self.step()
            self._brought += deltas
            if self._is_idle and not self._inbox:
                self._hand_on()
                # A waiting request may expire; nothing else happens by itself.
                self._wake.wait(EXPIRY_CHECK_S if self._scheduler.waiting else None)
                self._wake.clear()
        self._hand_on()

    def _hand_on(self) -> None:
        if self._brought:
            deltas, self._brought = self._brought, []
            self._on_deltas(deltas)

    @property
    def has_requests(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self._live or self._inbox)

    def step(self) -> list[TokenDelta]:
        """One step: schedule → forward and sample → update. Returns what came of it, or of the one before: possibly
        nothing."""
        deltas = self._take_inbox()
        self._expire(deltas)
        is_launched = False
        try:
            if self.border.may_be_crossed():
                self._hand_on()
                self._collect(deltas)
                self.border.cross()
            if self._speculation is not None and self._speculation.choose(self._scheduler.running):
                # What goes on from tokens that are not known cannot be proposed.
                self._collect(deltas)
                self._speculation.propose(self._hand_on)
            self._hand_on()
            is_launched = self._launch()
            # What a step with drafts draws must be known before anything comes after it.
            leaves = is_launched and self.parts.runner.overlaps and not self._under_way[-1].schedule.is_drafted
            self._collect(deltas, leave=1 if leaves else 0)
        except Exception as error:
            self._recover(error, deltas)
        self._is_idle = not is_launched and not self._under_way
        return deltas

    def _launch(self) -> bool:
        """Begins a step; False where there is nothing to compute."""
        schedule = self._scheduler.schedule()
        self._set_up(schedule)
        if schedule.is_empty:
            return False
        wanted = self.parts.collector.wanted_logits(schedule)
        began_s = time.perf_counter()
        batch = self.parts.builder.build(schedule, wanted)
        pending = self.parts.runner.execute(batch)
        self._steps += 1
        self._under_way.append(_Launched(schedule, self._advance(schedule), wanted, pending, began_s))
        return True

    def _collect(self, deltas: list[TokenDelta], *, leave: int = 0) -> None:
        """Waits for steps under way, until only `leave` are left, and turns their tokens into deltas."""
        while len(self._under_way) > leave:
            launched = self._under_way[0]
            result = launched.pending.wait()
            self._under_way.popleft()
            self._scheduler.num_done += 1
            self._update(launched, result, deltas)
            self._failures = 0
            if self._speculation is not None:
                ended_s = time.perf_counter()
                self._speculation.note_step(launched.schedule, ended_s - max(launched.began_s, self._last_step_ended_s))
                self._last_step_ended_s = ended_s

    def _take_inbox(self) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        while self._inbox:
            self._inbox.popleft()(deltas)
        return deltas

    def _set_up(self, schedule: Schedule) -> None:
        for request in schedule.admitted:
            self._begin_row(request)
        for request in schedule.new_blocks:
            self.parts.builder.append_block(request)

    def _begin_row(self, request: Request) -> None:
        self.parts.builder.set_blocks(request)
        if self._speculation is not None:
            self._speculation.admit(request)
        self.parts.runner.sampler.set_row(
            request.row,
            request.params,
            request.seed,
            request.token_ids[: request.num_prompt],
            request.output_ids,
        )

    def _advance(self, schedule: Schedule) -> list[Request]:
        """Counts what the step computes, takes the places of the tokens it draws, and starts forks; returns for whom
        tokens are drawn."""
        self._scheduler.num_begun += 1
        advance = self._scheduler.advance
        sampled = list(schedule.decode)
        for request in schedule.decode:
            advance(request, 1)
        for request, num_tokens in schedule.prefill:
            advance(request, num_tokens)
            if request.num_computed == len(request.token_ids):
                sampled.append(request)
                if request.siblings:
                    self._fork(request)
        for request in sampled:
            request.token_ids.append(UNKNOWN - request.row)
        return sampled

    def _update(self, launched: _Launched, result: StepResult, deltas: list[TokenDelta]) -> None:
        """Turns sampled tokens into deltas."""
        collector = self.parts.collector
        collector.begin(launched.schedule, result, launched.wanted)
        for request, _ in launched.schedule.prefill:
            if not request.is_finished:
                collector.collect_prompt(request)
        for request in launched.sampled:
            if request.is_finished:
                collector.skip()
                continue
            num_drafted, num_rejected = len(request.draft), request.num_rejected
            delta = collector.collect(request)
            deltas.append(delta)
            if num_drafted:
                self._settle_draft(request, num_drafted - (request.num_rejected - num_rejected))
            if delta.finish is not None:
                self._scheduler.publish(request)
                self._finish(request)

    def _settle_draft(self, request: Request, num_accepted: int) -> None:
        """Of a request that goes on K and V of the drafted tokens are there, too, where these were right."""
        if self._speculation is not None:
            self._speculation.note_outcome(request, len(request.draft), num_accepted)
        request.draft = []
        num_right = request.num_known - 1 - request.num_computed
        if num_right > 0:
            self._scheduler.advance(request, num_right)

    def _fork(self, leader: Request) -> None:
        started, copies = self._scheduler.fork(leader)
        for source, copy in copies:
            self.parts.kv.copy_block(source, copy)
        for sibling in started:
            self._begin_row(sibling)

    def _add(self, choices: list[Request]) -> None:
        self._num_taken += 1
        leader = choices[0]
        leader.siblings = choices[1:]
        for sibling in leader.siblings:
            sibling.state = RequestState.FORK_PENDING
        self._live[leader.request_id] = choices
        self._scheduler.add(leader)

    def _abort(self, request_id: str, deltas: list[TokenDelta]) -> None:
        self._end(self._live.get(request_id, ()), "abort", None, deltas)

    def _set_paused(self, request_id: str, is_paused: bool) -> None:
        for request in self._live.get(request_id, ()):
            request.is_paused = is_paused

    def _expire(self, deltas: list[TokenDelta]) -> None:
        now = time.monotonic()
        if now < self._next_expiry_check_s:
            return
        self._next_expiry_check_s = now + EXPIRY_CHECK_S
        timeout_s = self.config.queue_timeout_s
        for request in self._scheduler.expired(timeout_s):
            error = Unavailable(
                f"the request waited {timeout_s:g} s for its turn, the limit",
                retry_after_s=self._drain.time_to_drain_s(1),
            )
            self._end(self._live.get(request.request_id, ()), "error", error, deltas)

    def _end(
        self, choices: Iterable[Request], reason: FinishReason, error: ServeError | None, deltas: list[TokenDelta]
    ) -> None:
        for request in list(choices):
            deltas.append(self.parts.collector.end(request, reason, error))
            self._finish(request)

    def _finish(self, request: Request) -> None:
        row = request.row
        self._scheduler.finish(request)
        if self._speculation is not None:
            self._speculation.forget(request)
        if row >= 0:
            self.parts.runner.sampler.clear_row(row)
        self._drain.count()
        choices = self._live[request.request_id]
        choices.remove(request)
        if not choices:
            del self._live[request.request_id]

    def _recover(self, error: Exception, deltas: list[TokenDelta]) -> None:
        """A step broke: what ran is lost and told so, what waits goes on."""
        log.exception("a step failed")
        self._under_way.clear()
        self._scheduler.num_done = self._scheduler.num_begun
        if self.parts.runner.overlaps:
            # What was never computed may be in blocks that others can find.
            self._scheduler.pool.flush()
        self._failures += 1
        self.is_failed = self._failures >= MAX_FAILURES_IN_A_ROW
        failure = EngineFailed(f"the engine failed in a step ({type(error).__name__})")
        waiting = [r for r in self._scheduler.waiting if r.num_known < r.num_tokens]
        for request in [*self._scheduler.running, *waiting]:
            self._end(self._live.get(request.request_id, ()), "error", failure, deltas)
        if self.is_failed:
            deltas += self._fail_all(failure)

    def _fail_all(self, error: ServeError) -> list[TokenDelta]:
        deltas = self._take_inbox()
        for choices in list(self._live.values()):
            self._end(choices, "error", error, deltas)
        return deltas
