"""Which requests run this step, and how many tokens of each: admission, chunked prefill, preemption."""

import bisect
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from serve_app.engine.block_tables import BlockTables
from serve_app.engine.request import Request, RequestState
from serve_app.kv_cache.block_ledger import BlockLedger
from serve_app.kv_cache.layer_groups import KvWindow
from serve_app.layers.angle_sets import AngleSets, OneSet
from serve_app.options import EngineConfig


@dataclass(slots=True)
class Schedule:
    """One step's work. decode: requests that compute their last output token; prefill: (request, tokens now).

    admitted started to run in this step (their rows are to be set up); new_blocks: requests whose tables grew.
    num_drafted: proposed tokens of the decodes, which are computed with them.
    """

    decode: list[Request] = field(default_factory=list)
    prefill: list[tuple[Request, int]] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    new_blocks: list[Request] = field(default_factory=list)
    num_drafted: int = 0

    @property
    def is_drafted(self) -> bool:
        """Whether any decode has a draft."""
        return self.num_drafted > 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.decode and not self.prefill


class Scheduler:
    """Keeps the waiting queue and the running set, and holds every request's blocks.

    First in, first out: nothing overtakes the head of the queue, so nothing starves; a preempted request goes back to
    the head. Blocks for a whole prompt, or what a window leaves of it at a time, are taken at admission. A request that
    then runs out of them, by decoding or because it shared blocks that it gave up, gets those of the youngest one,
    which is preempted and later recomputed.
    """

    def __init__(
        self,
        pool: BlockLedger,
        config: EngineConfig,
        windows: Sequence[KvWindow],
        angles: AngleSets | None = None,
    ) -> None:
        """windows: of each group of layers. angles: None = one set for all."""
        assert config.max_seqs <= config.max_batched_tokens, "every running request must fit a decode step"
        self.pool = pool
        self.tables = BlockTables(pool, windows)
        self.waiting: deque[Request] = deque()
        # In order of arrival: the last is the youngest, the first to be preempted.
        self.running: list[Request] = []
        # Requests that have not begun wait on (engine.border).
        self.holds_new = False
        self.num_preemptions = 0
        # Steps; where the engine overlaps, one that was begun need not be done.
        self.num_begun = self.num_done = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        # Requests computed again because they outgrew their rotary set.
        self.num_outgrown = 0
        self._config = config
        self._angles = OneSet() if angles is None else angles
        self._has_windows = self.tables.has_windows
        self.chunk_tokens = min([config.prefill_chunk_tokens, *(window.chunk_tokens for window in windows)])
        self._block_size = config.block_size
        self._free_rows = list(range(config.max_seqs - 1, -1, -1))
        # The free count at which the head of the queue did not fit: not tried again until it changes.
        self._blocked_at = -1

    @property
    def prefix_lookups(self) -> int:
        """Admissions that asked the prefix cache."""
        return self.tables.prefix_lookups

    @property
    def prefix_hits(self) -> int:
        """Those that found something."""
        return self.tables.prefix_hits

    def add(self, request: Request) -> None:
        """Puts a new request at the end of the queue."""
        self.waiting.append(request)

    def schedule(self) -> Schedule:
        """Chooses this step's work: running decodes first, then running prompts, then new requests."""
        step = Schedule()
        if self._angles.are_several:
            self._recompute_outgrown()
        self._schedule_decodes(step)
        budget = self._config.max_batched_tokens - len(step.decode)
        budget = self._schedule_prefills(step, budget)
        self._fit_drafts(step, self._admit(step, budget))
        return step

    def _recompute_outgrown(self) -> None:
        """Requests whose tokens want another rotary set begin again, where they stand in the queue."""
        for request in reversed([r for r in self.running if self._is_outgrown(r)]):
            self.requeue(request)
            self.num_outgrown += 1

    def _is_outgrown(self, request: Request) -> bool:
        num_tokens = request.num_tokens
        # One whose last token is being drawn computes nothing any more.
        return num_tokens < request.max_total_tokens and self._angles.is_outgrown(request.angles, num_tokens)

    def exchange_angles(self, angles: AngleSets) -> AngleSets:
        """Other rotary sets in place of these, which it returns; no request runs."""
        assert not self.running
        old, self._angles = self._angles, angles
        return old

    def _schedule_decodes(self, step: Schedule) -> None:
        block_size = self._block_size
        # Oldest first; a preemption shortens `running` from its end, so requests already chosen are older.
        i = 0
        while i < len(self.running):
            request = self.running[i]
            i += 1
            num_tokens = len(request.token_ids)
            if num_tokens - request.num_computed != 1 or num_tokens == request.num_prompt or request.is_paused:
                continue
            if num_tokens >= request.max_total_tokens:
                continue  # its last token is being drawn
            if self._has_windows:
                # Its tables may have grown behind its window, too, or one less than the others.
                if not self._grow(request, 1, step):
                    continue
                step.new_blocks.append(request)
            elif request.num_computed == len(request.tables[0]) * block_size:
                if not self._grow(request, 1, step):
                    continue
                step.new_blocks.append(request)
            step.decode.append(request)

    def _fit_drafts(self, step: Schedule, room: int) -> None:
        """Shortens drafts to what there is room for when decodes and prompts have theirs, room tokens in all: they are
        worth neither a preemption nor that a prompt waits. Blocks are taken for all that may come of the step."""
        for request in step.decode:
            if not request.draft:
                continue
            # The last token is drawn from the logits of the one before.
            most = min(self.chunk_tokens, request.max_total_tokens - request.num_tokens) - 1
            num_drafted = min(len(request.draft), room, most)
            if self._angles.are_several and self._angles.is_outgrown(request.angles, request.num_tokens + num_drafted):
                num_drafted = 0
            if num_drafted <= 0 or not self.tables.grow(request, 1 + num_drafted):
                request.draft = []
                continue
            request.draft = request.draft[:num_drafted]
            room -= num_drafted
            step.num_drafted += num_drafted
            step.new_blocks.append(request)

    def _grow(self, request: Request, num_tokens: int, step: Schedule) -> bool:
        """Blocks for its next tokens, at the price of younger requests; False if it was preempted itself."""
        while not self.tables.grow(request, num_tokens):
            victim = self.running[-1]
            assert victim is not request or len(self.running) > 1, "a request larger than the pool was admitted"
            self.preempt(victim)
            if victim is request:
                return False
            if victim in step.decode:
                step.decode.remove(victim)
            step.new_blocks = [other for other in step.new_blocks if other is not victim]
        return True

    def _schedule_prefills(self, step: Schedule, budget: int) -> int:
        i = 0
        while i < len(self.running):
            request = self.running[i]
            i += 1
            pending = request.num_pending
            is_prompt = pending > 1 or len(request.token_ids) == request.num_prompt
            if is_prompt and budget > 0 and not request.is_paused:
                tokens = min(pending, budget, self.chunk_tokens)
                if self._has_windows:
                    if not self._grow(request, tokens, step):
                        continue
                    step.new_blocks.append(request)
                step.prefill.append((request, tokens))
                budget -= tokens
        return budget

    def _admit(self, step: Schedule, budget: int) -> int:
        """Begins waiting requests with budget tokens; returns how many of these are left."""
        skipped: list[Request] = []
        while self.waiting and self._free_rows and budget > 0:
            request = self.waiting[0]
            if request.is_paused:
                skipped.append(self.waiting.popleft())
                continue
            if request.last_step > self.num_done:
                break  # preempted since its step began, whose results it still has to get
            if self.holds_new and not request.has_begun:
                break
            if self.pool.num_free == self._blocked_at or not self._take_blocks(request):
                self._blocked_at = self.pool.num_free
                break
            self._blocked_at = -1
            self.waiting.popleft()
            self._start(request)
            tokens = min(request.num_pending, budget, self.chunk_tokens)
            budget -= tokens
            step.admitted.append(request)
            step.prefill.append((request, tokens))
        self.waiting.extendleft(reversed(skipped))
        return budget

    def _take_blocks(self, request: Request) -> bool:
        """A rotary set and blocks to begin with; all or none."""
        taken = self._angles.take(request.num_prompt, request.num_tokens, request.max_total_tokens)
        if taken is None:
            return False
        if taken != request.angles:
            request.angles = taken
            request.block_hashes = []
        if self.tables.admit(request, min(len(self.running), self.pool.num_total // 16)):
            return True
        self._angles.give_back(taken)
        return False

    def _start(self, request: Request) -> None:
        if request.state is not RequestState.PREEMPTED:
            request.num_cached = request.num_computed
            if request.choice == 0:
                self.num_prompt_tokens += request.num_prompt
                self.num_cached_tokens += request.num_cached
        request.row = self._free_rows.pop()
        request.state = RequestState.RUNNING
        bisect.insort(self.running, request, key=_by_arrival)

    def advance(self, request: Request, num_tokens: int) -> None:
        """Records that a step under way computes num_tokens of a request."""
        request.last_step = self.num_begun
        request.num_computed += num_tokens
        self.tables.advance(request)

    def publish(self, request: Request) -> None:
        """Lets others find blocks whose last token has become known since the last step."""
        if request.state is RequestState.RUNNING:
            self.tables.publish(request)

    def fork(self, leader: Request) -> tuple[list[Request], list[tuple[int, int]]]:
        """Starts the siblings of a request whose prompt is computed, on its blocks.

        Returns those that run now and the (source, destination) blocks to copy before the next step. A sibling for
        which there is no room waits at the head of the queue.
        """
        started: list[Request] = []
        copies: list[tuple[int, int]] = []
        waiting: list[Request] = []
        for sibling in leader.siblings:
            copied = self.tables.fork(leader, sibling) if self._free_rows else None
            if copied is None:
                sibling.state = RequestState.WAITING
                waiting.append(sibling)
                continue
            copies += copied
            sibling.angles = leader.angles
            self._angles.share(sibling.angles)
            self._start(sibling)
            started.append(sibling)
        self.waiting.extendleft(reversed(waiting))
        leader.siblings = []
        return started, copies

    def preempt(self, request: Request) -> None:
        """Takes a running request's blocks for others; it waits at the head of the queue and is computed again."""
        self.requeue(request)
        self.num_preemptions += 1

    def requeue(self, request: Request) -> None:
        """Sends a running request back to the head of the queue, without blocks: it is computed again."""
        self._release(request)
        request.num_computed = request.num_published = 0
        request.draft = []
        request.state = RequestState.PREEMPTED
        self.running.remove(request)
        self.waiting.appendleft(request)
        self._blocked_at = -1

    def finish(self, request: Request) -> None:
        """Forgets a request wherever it stands; its blocks are free at once."""
        if request.state is RequestState.RUNNING:
            self._release(request)
            self.running.remove(request)
        elif request.state in (RequestState.WAITING, RequestState.PREEMPTED):
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        self._blocked_at = -1

    def _release(self, request: Request) -> None:
        self.tables.release(request)
        self._angles.give_back(request.angles)
        self._free_rows.append(request.row)
        request.row = -1

    def expired(self, timeout_s: float) -> Iterable[Request]:
        """The waiting requests that have waited too long since they arrived.

        Those that have begun do not expire: preempted ones, and further choices of a request that runs. Nor does one
        that is held back.
        """
        if self.holds_new:
            return []
        deadline = time.monotonic() - timeout_s
        return [r for r in self.waiting if r.arrival_s < deadline and not r.has_begun]


def _by_arrival(request: Request) -> tuple[float, int]:
    return request.arrival_s, request.choice
