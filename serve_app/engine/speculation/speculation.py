"""The speculation of one engine: who drafts how much for which request, and what came of it."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from serve_app.engine.request import Request, RequestState
from serve_app.engine.sampler import GREEDY_BELOW
from serve_app.engine.scheduler import Schedule
from serve_app.engine.speculation.control import Choice, SpeculationControl
from serve_app.engine.speculation.draft_call import SamplingChain
from serve_app.engine.speculation.ngram import NgramProposer
from serve_app.engine.speculation.proposer import DraftWish, Proposer, no_work
from serve_app.engine.speculation.step_timer import StepTimer
from serve_app.engine.speculation.suffix import SuffixProposer
from serve_app.engine.stats import SpeculationCounts
from serve_app.options import SamplingParams, SpeculationOptions

# A start may be later by so much, and one step more.
_WARM_UP_S = 1.0


class Speculation:
    """Between the engine, what proposes, and the control that decides. All on the stepping thread, but counts."""

    def __init__(
        self, options: SpeculationOptions, chunk_tokens: int, batch_tokens: int, draft: Proposer | None = None
    ) -> None:
        """chunk_tokens, batch_tokens: most that a step computes of a prompt, and in all. draft: the proposer over a
        draft model, if there is one; its owner closes it."""
        proposers: list[Proposer] = [] if draft is None else [draft]
        if options.use in ("auto", "suffix"):
            proposers.append(SuffixProposer())
        if options.use in ("auto", "ngram"):
            proposers.append(NgramProposer())
        self._proposers = {proposer.name: proposer for proposer in proposers}
        self._chunk_tokens, self._batch_tokens = chunk_tokens, batch_tokens
        self._max_tokens = options.max_tokens
        self._is_sampled = options.draft_sampling == "sampled"
        self._control = SpeculationControl(options, list(self._proposers))
        self._known: set[int] = set()
        self._chosen: list[tuple[Request, Choice]] = []
        # Who made the drafts of the coming step, by sequence.
        self._proposed_by: dict[int, str] = {}
        # Every key is there from the beginning: other threads copy them.
        self._counts = SpeculationCounts(
            drafted=dict.fromkeys(self._proposers, 0),
            accepted=dict.fromkeys(self._proposers, 0),
            accepted_by_position=[0] * options.max_tokens,
            gamma=dict.fromkeys(range(options.max_tokens + 1), 0),
        )

    def warm_up(self, timer: StepTimer, max_sequences: int) -> None:
        """Measures steps, before any request runs."""
        if self._proposers:
            most = min(max_sequences, timer.most_sequences(1 + self._max_tokens))
            # The first one of all wakes threads and touches memory.
            timer.measure(1, 1)
            self._control.warm_up(timer.measure, most, _WARM_UP_S)

    def counts(self) -> SpeculationCounts:
        """What came of it so far; a copy, from any thread."""
        now = self._counts
        return replace(
            now,
            drafted=dict(now.drafted),
            accepted=dict(now.accepted),
            accepted_by_position=list(now.accepted_by_position),
            gamma=dict(now.gamma),
            timeouts=sum(proposer.num_timeouts for proposer in self._proposers.values()),
        )

    def admit(self, request: Request) -> None:
        """A request runs; again, where it was preempted before."""
        if request.sequence not in self._known:
            self._known.add(request.sequence)
            for name, proposer in self._proposers.items():
                if name == "draft" and not self._room(request):
                    continue
                if self._control.wants_prompts(name):
                    proposer.admit(request.sequence, request.token_ids[: request.num_known], request.cache_salt)
                else:
                    self._control.note_untold(request.sequence, request.num_known)

    def forget(self, request: Request) -> None:
        """A request ended."""
        if request.sequence in self._known:
            self._known.remove(request.sequence)
            token_ids = request.token_ids[: request.num_known]
            for proposer in self._proposers.values():
                proposer.forget(request.sequence, token_ids)
            self._control.forget(request.sequence)

    def choose(self, running: Sequence[Request]) -> bool:
        """Decides for the coming step of these requests; whether anything is to be proposed."""
        decodes, wanted, num_others, num_prompts = [], [], 0, 0
        for request in running:
            if request.is_paused:
                continue
            if request.num_pending == 1 and request.num_tokens > request.num_prompt:
                decodes.append(request)
                wanted.append((request.sequence, self._room(request)))
            else:
                num_others += min(request.num_pending, self._chunk_tokens)
                num_prompts += 1
        if not decodes:
            return False
        num_others = min(num_others, self._batch_tokens - len(decodes))
        control = self._control
        control.set_present([name for name, proposer in self._proposers.items() if proposer.is_open])
        self._chosen = list(zip(decodes, control.choose(wanted, num_others, num_prompts), strict=True))
        if control.may_propose:
            for (_, choice), (_, room) in zip(self._chosen, wanted, strict=True):
                self._counts.gamma[choice.num_tokens] += room > 0
        return any(choice.num_tokens for _, choice in self._chosen)

    def propose(self, meanwhile: Callable[[], None] = no_work) -> None:
        """Gives the requests the drafts that were decided on; every token that was drawn is known. meanwhile: what may
        be done while a draft works, see Proposer; it is not counted in what the step waits."""
        asked: defaultdict[str, list[tuple[Request, DraftWish]]] = defaultdict(list)
        for request, choice in self._chosen:
            # It may have ended since, or have come nearer to its end.
            num_tokens = min(choice.num_tokens, self._room(request))
            if choice.proposer is None or num_tokens <= 0 or request.state is not RequestState.RUNNING:
                continue
            wish = DraftWish(
                request.sequence, request.token_ids, request.num_prompt, num_tokens, self._chain(request.params)
            )
            asked[choice.proposer].append((request, wish))
        for name, pairs in asked.items():
            timed = _Timed(meanwhile)
            began_s = time.perf_counter()
            drafts = self._proposers[name].propose([wish for _, wish in pairs], timed)
            seconds = time.perf_counter() - began_s - timed.seconds
            self._counts.draft_seconds += seconds
            self._counts.draft_waits += 1
            self._control.note_proposal(name, len(pairs), max(wish.max_tokens for _, wish in pairs), seconds)
            for (request, _), draft in zip(pairs, drafts, strict=True):
                if draft:
                    request.draft, self._proposed_by[request.sequence] = draft, name
                else:
                    self._control.note_outcome(request.sequence, name, 0, 0)

    def note_outcome(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """A request's draft was verified."""
        name = self._proposed_by[request.sequence]
        self._control.note_outcome(request.sequence, name, num_drafted, num_accepted)
        counts = self._counts
        counts.steps += 1
        counts.tokens += num_accepted + 1
        counts.drafted[name] += num_drafted
        counts.accepted[name] += num_accepted
        for position in range(num_accepted):
            counts.accepted_by_position[position] += 1

    def note_step(self, schedule: Schedule, seconds: float) -> None:
        """A step is done, and every outcome of it was noted."""
        self._proposed_by.clear()
        if schedule.decode:
            num_tokens = len(schedule.decode) + schedule.num_drafted + sum(n for _, n in schedule.prefill)
            self._control.note_step(len(schedule.decode), num_tokens, seconds)
        if schedule.is_drafted:
            self._counts.verify_seconds += seconds
            self._counts.verify_steps += 1

    def _chain(self, params: SamplingParams) -> SamplingChain | None:
        """How tokens may be sampled for a request. With a seed its text must not hang on what is proposed."""
        if not self._is_sampled or params.seed is not None or params.temperature < GREEDY_BELOW:
            return None
        return SamplingChain(params.temperature, params.top_k, params.top_p, params.min_p)

    def _room(self, request: Request) -> int:
        """The most tokens that may be drafted for it: its last one is drawn in any case."""
        asked = request.params.speculation
        if not asked.enabled:
            return 0
        most = self._max_tokens if asked.max_tokens is None else min(self._max_tokens, asked.max_tokens)
        return max(0, min(most, request.max_total_tokens - request.num_tokens - 1))


class _Timed:
    """An action, and how long it took so far."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.seconds = 0.0

    def __call__(self) -> None:
        began_s = time.perf_counter()
        self._action()
        self.seconds += time.perf_counter() - began_s
