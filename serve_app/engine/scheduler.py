"""Which requests run this step, and how many tokens of each: admission, chunked prefill, preemption."""

import bisect
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from serve_app.engine.request import Request, RequestState
from serve_app.kv_cache.block_ledger import NO_BLOCK, BlockLedger
from serve_app.options import EngineConfig


@dataclass(slots=True)
class Schedule:
    """One step's work. decode: requests that compute their last output token; prefill: (request, tokens now).

    admitted started to run in this step (their rows are to be set up); new_blocks: requests whose block list grew.
    """

    decode: list[Request] = field(default_factory=list)
    prefill: list[tuple[Request, int]] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    new_blocks: list[Request] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.decode and not self.prefill


class Scheduler:
    """Keeps the waiting queue and the running set, and holds every request's blocks.

    First in, first out: nothing overtakes the head of the queue, so nothing starves; a preempted request goes back to
    the head. Blocks for a whole prompt are taken at admission, so only a decode can run out of them, and then the
    youngest request is preempted and later recomputed.
    """

    def __init__(self, pool: BlockLedger, config: EngineConfig) -> None:
        assert config.max_seqs <= config.max_batched_tokens, "every running request must fit a decode step"
        self.pool = pool
        self.waiting: deque[Request] = deque()
        # In order of arrival: the last is the youngest, the first to be preempted.
        self.running: list[Request] = []
        # Requests that have not begun wait on (engine.border).
        self.holds_new = False
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.prefix_lookups = 0
        self.prefix_hits = 0
        self._config = config
        self._block_size = config.block_size
        self._free_rows = list(range(config.max_seqs - 1, -1, -1))
        # The free count at which the head of the queue did not fit: not tried again until it changes.
        self._blocked_at = -1

    def add(self, request: Request) -> None:
        """Puts a new request at the end of the queue."""
        self.waiting.append(request)

    def schedule(self) -> Schedule:
        """Chooses this step's work: running decodes first, then running prompts, then new requests."""
        step = Schedule()
        self._schedule_decodes(step)
        budget = self._config.max_batched_tokens - len(step.decode)
        budget = self._schedule_prefills(step, budget)
        self._admit(step, budget)
        return step

    def _schedule_decodes(self, step: Schedule) -> None:
        block_size = self._block_size
        # Oldest first; a preemption shortens `running` from its end, so requests already chosen are older.
        i = 0
        while i < len(self.running):
            request = self.running[i]
            i += 1
            if request.is_paused or not request.num_output or request.num_pending != 1:
                continue
            if request.num_computed == len(request.blocks) * block_size:
                if not self._take_block(request):
                    continue
                step.new_blocks.append(request)
            step.decode.append(request)

    def _take_block(self, request: Request) -> bool:
        """One more block for a decode, at the price of younger requests; False if it was preempted itself."""
        while True:
            block = self.pool.allocate(1)
            if block is not None:
                request.blocks += block
                return True
            victim = self.running[-1]
            assert victim is not request or len(self.running) > 1, "a request larger than the pool was admitted"
            self.preempt(victim)
            if victim is request:
                return False

    def _schedule_prefills(self, step: Schedule, budget: int) -> int:
        for request in self.running:
            pending = request.num_pending
            is_prompt = pending > 1 or not request.num_output
            if is_prompt and budget > 0 and not request.is_paused:
                tokens = min(pending, budget, self._config.prefill_chunk_tokens)
                step.prefill.append((request, tokens))
                budget -= tokens
        return budget

    def _admit(self, step: Schedule, budget: int) -> None:
        skipped: list[Request] = []
        while self.waiting and self._free_rows and budget > 0:
            request = self.waiting[0]
            if request.is_paused:
                skipped.append(self.waiting.popleft())
                continue
            if self.holds_new and not request.has_begun:
                break
            if self.pool.num_free == self._blocked_at or not self._take_prompt_blocks(request):
                self._blocked_at = self.pool.num_free
                break
            self._blocked_at = -1
            self.waiting.popleft()
            self._start(request)
            tokens = min(request.num_pending, budget, self._config.prefill_chunk_tokens)
            budget -= tokens
            step.admitted.append(request)
            step.prefill.append((request, tokens))
        self.waiting.extendleft(reversed(skipped))

    def _take_prompt_blocks(self, request: Request) -> bool:
        """Blocks for all known tokens: what the prefix cache has, then new ones; all or none."""
        if self.pool.is_contiguous:
            blocks = self.pool.allocate(-(-request.max_total_tokens // self._block_size))
            if blocks is None:
                return False
            request.blocks = blocks
            return True
        hashes = self._prompt_hashes(request)
        num_blocks = -(-request.num_tokens // self._block_size)
        peek = self.pool.peek(hashes)
        reserve = min(len(self.running), self.pool.num_total // 16)
        if num_blocks - peek.num_matched + reserve > peek.num_free_after:
            return False
        matched = self.pool.match(hashes)
        fresh = self.pool.allocate(num_blocks - len(matched))
        if fresh is None:
            self.pool.release(matched)
            return False
        request.blocks = matched + fresh
        request.num_computed = len(matched) * self._block_size
        request.num_published = len(matched)
        if hashes:
            self.prefix_lookups += 1
            self.prefix_hits += bool(matched)
        return True

    def _prompt_hashes(self, request: Request) -> list[bytes]:
        """What to look up at admission. The last token is always computed anew, so that there are logits."""
        if not self.pool.is_caching or request.prompt_logprobs is not None:
            return []
        num_full = (request.num_tokens - 1) // self._block_size
        self._extend_hashes(request, num_full)
        return request.block_hashes[:num_full]

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        hashes, size, hasher = request.block_hashes, self._block_size, self.pool.hasher
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else hasher.root(request.cache_salt)
            hashes.append(hasher.next(parent, request.token_ids[start : start + size]))

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
        """Records that a step computed num_tokens of a request; its blocks that are now full are published."""
        request.num_computed += num_tokens
        num_full = request.num_computed // self._block_size
        if num_full > request.num_published and self.pool.is_caching:
            self._extend_hashes(request, num_full)
            blocks = request.blocks
            for i in range(request.num_published, num_full):
                self.pool.publish(blocks[i], request.block_hashes[i], blocks[i - 1] if i else NO_BLOCK)
            request.num_published = num_full

    def fork(self, leader: Request) -> tuple[list[Request], list[tuple[int, int]]]:
        """Starts the siblings of a request whose prompt is computed, on its blocks.

        Returns those that run now and the (source, destination) blocks to copy before the next step. A sibling for
        which there is no room waits at the head of the queue.
        """
        started: list[Request] = []
        copies: list[tuple[int, int]] = []
        waiting: list[Request] = []
        # The last prompt token is computed once more by each choice: its logits are what they differ from.
        num_shared = leader.num_prompt - 1
        num_full, num_tail = divmod(num_shared, self._block_size)
        for sibling in leader.siblings:
            can_run = self._free_rows and not self.pool.is_contiguous
            own = self.pool.allocate(1) if can_run else None
            if own is None:
                sibling.state = RequestState.WAITING
                waiting.append(sibling)
                continue
            tail = (leader.blocks[num_full], own[0]) if num_tail else None
            self.pool.fork(leader.blocks[:num_full], tail)
            sibling.blocks = leader.blocks[:num_full] + own
            sibling.num_computed = num_shared
            sibling.num_published = min(leader.num_published, num_full)
            sibling.block_hashes = leader.block_hashes[: sibling.num_published]
            if tail:
                copies.append(tail)
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
        request.state = RequestState.PREEMPTED
        self.running.remove(request)
        self.waiting.appendleft(request)

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
        self.pool.release(request.blocks)
        request.blocks = []
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
