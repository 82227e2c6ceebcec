"""How many tokens are drafted for whom, and by which proposer: as many as raise tokens a second.

Source: Liu et al., TurboSpec (2024), whose goodput is maximised here for each sequence of a step, not for all alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from serve_app.engine.speculation.acceptance import Acceptance, Trials
from serve_app.engine.speculation.allocation import Allocation, Offer, add_best, add_best_depth
from serve_app.engine.speculation.costs import ProposalTimes, StepTimes
from serve_app.options import SpeculationOptions

# Of all time, what trying may take that does not pay for itself.
_PROBING_SHARE = 0.0125
# Steps from one failed try of a proposer for a sequence to the next, at most; they double from one.
_MOST_STEPS_BETWEEN = 32
# So many sequences are looked at for tries in one step.
_LOOKED_AT = 8
# What may be saved up for: tries worth this many steps' share, or one that is dearer.
_SAVED_STEPS = 100
# A choice must promise this much more than none, and what such choices took too long lately: what is measured is not
# exact.
_LEAST_GAIN = 1.02
# How much slower than promised steps with proposals are, by their last few: no one step counts for more than this. With
# so many plain steps half of it is forgotten.
_EXCESS_MEMORY = 4
_MOST_EXCESS = 1.2
_EXCESS_HALVING = 256
# A choice is kept so long while all is as it was, but while the control is new.
_STEPS_A_CHOICE = 4
_NEW_STEPS = 64
# Until so many outcomes are known, a proposer is asked for few tokens of few sequences only.
_FEW_OUTCOMES = 8
_FEW_TOKENS = 2
_FEW_SEQUENCES = 4
_DRAFT = "draft"
# A draft is told prompts while it is chosen for so great a share of the last sequences' steps: computing prompts takes
# time, too.
_LEAST_DRAFT_SHARE = 0.1
_SHARE_MEMORY = 512
# Tokens of a prompt for which it takes as long as for a drafted one, at least.
_PROMPT_TOKENS_A_DRAFTED = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """For one sequence and step: at most num_tokens, asked of a proposer. None: it decodes plainly, num_tokens is 0."""

    proposer: str | None
    num_tokens: int


_PLAIN = Choice(None, 0)


class SpeculationControl:
    """Closed loop: chooses by what was measured, measures what it chose.

    Expected is, for k drafted tokens, 1 + the sum over j <= k of the product over i <= j of the acceptance at i; time
    is the target's step for that many tokens and the proposals beside it. A step's choice maximises the quotient over
    all sequences. Where nothing is chosen, single tokens are tried now and then, for 1.25 % of the time at most.
    """

    def __init__(self, options: SpeculationOptions, proposers: Sequence[str]) -> None:
        """proposers: the names of those that there are; of them are used those that the options say."""
        is_on = options.use != "off" and options.max_tokens > 0
        names = [name for name in proposers if is_on and options.use in ("auto", name)]
        self._max_tokens = options.max_tokens
        self._is_fixed = options.is_fixed
        self._steps = StepTimes()
        self._proposers = {name: _Proposer(options.max_tokens) for name in names}
        self._present = names
        self._sequences: dict[int, _Sequence] = {}
        self._step = 0
        self._budget = 0.0
        # Whether the coming step has anything to try: for the others nothing is saved up.
        self._may_try = False
        self._dearest_probe = 0.0
        # Of a step with tries: what it would take without, and what these were thought to take.
        self._without_probes: float | None = None
        self._probes_charged = 0.0
        self._next_probed = 0
        # What steps with proposals took, by what they were thought to take.
        self._excess = 1.0
        # The plan of a step that does just what was planned.
        self._followed: _Plan | None = None
        # How long the step has waited for proposals.
        self._waited = 0.0
        self._draft_share = 1.0
        self._plan: _Plan | None = None
        # Choices that were but tries.
        self.num_probes = 0

    def warm_up(self, measure: Callable[[int, int], float], max_sequences: int, limit_s: float = float("inf")) -> None:
        """Fills the table of steps: measure(num_sequences, num_tokens) runs one of the target and gives its seconds.

        Small ones first, until they took limit_s together: the others are learnt when they are needed.
        """
        for num_sequences in sorted({*(1 << k for k in range(max_sequences.bit_length())), max_sequences}):
            for num_drafted in sorted({0, self._max_tokens // 2, self._max_tokens}):
                num_tokens = num_sequences * (1 + num_drafted)
                seconds = measure(num_sequences, num_tokens)
                self._steps.warm_up(num_tokens, seconds)
                limit_s -= seconds
                if limit_s <= 0:
                    return

    def set_present(self, names: Sequence[str]) -> None:
        """Which proposers there are just now: no other is chosen, and of what is not asked nothing is learnt."""
        present = [name for name in self._proposers if name in names]
        if present != self._present:
            self._present = present
            self._plan = None

    @property
    def may_propose(self) -> bool:
        """Whether anybody could be chosen."""
        return bool(self._present)

    def wants_prompts(self, proposer: str) -> bool:
        """Whether it should know sequences before it is asked about them."""
        if proposer != _DRAFT or self._is_fixed or proposer not in self._proposers:
            return True
        is_new = self._proposers[proposer].overall.num_noted < _FEW_OUTCOMES
        return is_new or self._draft_share >= _LEAST_DRAFT_SHARE

    def note_untold(self, sequence: int, num_tokens: int) -> None:
        """The draft was not told a sequence of so many tokens: it has to compute them when it is tried."""
        self._state(sequence).num_untold = num_tokens

    def choose(self, wanted: Sequence[tuple[int, int]], num_other_tokens: int, num_prompts: int = 0) -> list[Choice]:
        """For each (sequence, most tokens that it may get, 0: none) of a step that decodes them, and computes
        num_other_tokens of num_prompts prompts beside. Each call is a step."""
        self._step += 1
        self._waited = 0.0
        self._may_try = any(most for _, most in wanted)
        if not self._present or not wanted:
            picked = [_PLAIN] * len(wanted)
        elif self._is_fixed:
            picked = self._fixed(wanted)
        else:
            plan = self._plan
            if plan is None or self._step >= plan.ends or plan.wanted != wanted or plan.num_others != num_other_tokens:
                plan = self._plan = self._planned(wanted, num_other_tokens, num_prompts)
            picked = list(plan.picked)
            self._wait_for_worth(plan, picked)
            count = sum(limit > 0 for limit in plan.limits)
            num_drafted = plan.num_drafted and sum(choice.proposer == _DRAFT for choice in picked)
            self._draft_share += (num_drafted - self._draft_share * count) / (count + _SHARE_MEMORY)
            self._probe(plan, picked)
            self._followed = plan if plan.best.num_offers and picked == plan.picked else None
            for state, choice in zip(plan.states, picked, strict=True):
                state.num_asked = choice.num_tokens
                if choice.proposer == _DRAFT:
                    state.num_untold = 0
        return picked

    def note_step(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """A step of the target that decoded num_sequences computed num_tokens in all, drafted ones and prompts' too."""
        self._note_excess(num_tokens, seconds)
        if self._steps.note(num_tokens, seconds):
            self._plan = None
        if self._without_probes is not None:
            # What tries really took, where that is more than was thought.
            taken = seconds - self._without_probes + self._waited
            self._budget -= max(0.0, taken - self._probes_charged)
            self._without_probes = None
        most = max(_PROBING_SHARE * _SAVED_STEPS * seconds, 1.5 * self._dearest_probe)
        if self._may_try:
            self._budget = min(self._budget + _PROBING_SHARE * seconds, most)

    def note_proposal(self, proposer: str, num_sequences: int, depth: int, seconds: float) -> None:
        """The step waited so long for proposals of at most depth tokens for each of num_sequences."""
        self._waited += seconds
        if proposer in self._proposers and self._proposers[proposer].times.note(num_sequences, depth, seconds):
            self._plan = None

    def note_outcome(self, sequence: int, proposer: str, num_drafted: int, num_accepted: int) -> None:
        """Of what was chosen for the sequence num_drafted tokens came, none perhaps, and num_accepted were right.

        Of a proposal that was not verified at all, for preemption or so, nothing is to be said.
        """
        state = self._sequences.get(sequence)
        if state is None or proposer not in state.tracks:
            return
        self._proposers[proposer].note(state.num_asked, num_drafted, num_accepted)
        track = state.tracks[proposer]
        track.acceptance.note(state.num_asked, num_drafted, num_accepted)
        if num_accepted and track.is_probe:
            self._plan = None
        track.is_probe = False
        track.steps_between = 1 if num_accepted else min(2 * track.steps_between, _MOST_STEPS_BETWEEN)
        track.next_probe = self._step + track.steps_between

    def forget(self, sequence: int) -> None:
        """The sequence ended."""
        self._sequences.pop(sequence, None)

    def _note_excess(self, num_tokens: int, seconds: float) -> None:
        """The choice that looks best does so by mistake, perhaps: what it takes then is held against the next ones."""
        plan, self._followed = self._followed, None
        if plan is None or num_tokens >= len(plan.times):
            self._excess **= 0.5 ** (1 / _EXCESS_HALVING)
            return
        expected = plan.best.seconds + plan.times[num_tokens] - plan.times[round(plan.best.num_tokens)]
        ratio = min(max((seconds + self._waited) / expected, 1 / _MOST_EXCESS), _MOST_EXCESS)
        self._excess *= (ratio / self._excess) ** (1 / _EXCESS_MEMORY)

    def _state(self, sequence: int) -> "_Sequence":
        state = self._sequences.get(sequence)
        if state is None:
            tracks = {
                name: _Track(Acceptance(self._max_tokens, proposer.overall))
                for name, proposer in self._proposers.items()
            }
            state = self._sequences[sequence] = _Sequence(tracks)
        return state

    def _fixed(self, wanted: Sequence[tuple[int, int]]) -> list[Choice]:
        name = self._present[0]
        picked = []
        for sequence, most in wanted:
            num_tokens = self._state(sequence).num_asked = min(most, self._max_tokens)
            picked.append(Choice(name, num_tokens) if num_tokens else _PLAIN)
        return picked

    def _planned(self, wanted: Sequence[tuple[int, int]], num_others: int, num_prompts: int) -> "_Plan":
        for proposer in self._proposers.values():
            proposer.update()
        states = [self._state(sequence) for sequence, _ in wanted]
        limits = [min(most, self._max_tokens) for _, most in wanted]
        num_tokens = len(states) + num_others
        longest = num_tokens + sum(limits) + len(states) + num_prompts + 1
        # Before any step was noted there is nothing to weigh: all take the same.
        times = self._steps.table(longest) if self._steps.is_known else [1.0] * (longest + 1)
        # The time of prompts is not lost: it is worth what all would decode in it.
        num_running = len(states) + num_prompts
        worth = (times[num_tokens] - times[len(states)]) * num_running / times[num_running]
        plain = Allocation(len(states) + worth, num_tokens, times[num_tokens])
        names, best = self._best(states, limits, plain, times)
        picked = [
            Choice(name, count) if count else _PLAIN for name, count in zip(names, best.count(len(states)), strict=True)
        ]
        ends = self._step + (_STEPS_A_CHOICE if self._step > _NEW_STEPS else 1)
        num_drafted = sum(choice.proposer == _DRAFT for choice in picked)
        gained = (best.goodput / plain.goodput - 1) * plain.seconds / max(1, num_drafted)
        return _Plan(list(wanted), num_others, states, limits, times, best, picked, ends, num_drafted, gained)

    def _best(
        self, states: Sequence["_Sequence"], limits: Sequence[int], plain: Allocation, times: Sequence[float]
    ) -> tuple[list[str], Allocation]:
        """Who would propose for each sequence, and which of these offers to take."""
        names, best = [""] * len(states), plain
        at_least = plain.goodput * max(_LEAST_GAIN, self._excess)
        lone = [name for name in self._present if name != _DRAFT]
        if lone:
            lone_names, offers = self._offers(states, limits, lone, plain, times)
            found = add_best(plain, offers, times, 0, 0.0)
            if found.goodput > at_least:
                names, best, at_least = lone_names, found, found.goodput
        if _DRAFT in self._present:
            draft_names, offers = self._offers(states, limits, self._present, plain, times)
            begin, each = self._proposers[_DRAFT].times.line(max(1, draft_names.count(_DRAFT)))
            seconds = [begin + each * depth for depth in range(max(limits) + 1)]
            deepest = add_best_depth(plain, offers, times, seconds, at_least)
            if deepest is not None:
                names, best = draft_names, deepest
        return names, best

    def _offers(
        self,
        states: Sequence["_Sequence"],
        limits: Sequence[int],
        names: Sequence[str],
        plain: Allocation,
        times: Sequence[float],
    ) -> tuple[list[str], list[Offer]]:
        """For each sequence the most valuable of the named proposers, and what these offer, the best first."""
        num_tokens, width = int(plain.num_tokens), len(states)
        per_token = (times[num_tokens + width] - times[num_tokens]) / width
        # Tokens that a second is worth to one sequence.
        rate = plain.goodput / width
        shares = {}
        new = {name for name in names if self._proposers[name].overall.num_noted < _FEW_OUTCOMES}
        for name in names:
            begin, each = self._proposers[name].times.line(width)
            shares[name] = (begin + each * self._max_tokens) / width
        chosen, offers = [], []
        for index, state in enumerate(states):
            name = names[0]
            if len(names) > 1:
                most_valued = float("-inf")
                for candidate in names:
                    gain, load = state.tracks[candidate].acceptance.totals()
                    value = gain - (per_token * load + shares[candidate]) * rate
                    if value > most_valued:
                        name, most_valued = candidate, value
            chosen.append(name)
            is_draft = name == _DRAFT
            seconds = 0.0 if is_draft else shares[name]
            limit = limits[index]
            if name in new:
                limit = min(limit, _FEW_TOKENS) if index < _FEW_SEQUENCES else 0
            for j, worth, gain, load in state.tracks[name].acceptance.expected()[:limit]:
                offers.append((worth, j, j + 1 if is_draft else 0, index, gain, load, seconds))
                seconds = 0.0
        offers.sort()
        return chosen, offers

    def _wait_for_worth(self, plan: "_Plan", picked: list[Choice]) -> None:
        """A draft that has not been told a sequence is asked only when it would have gained as much as that takes. What
        is left of a choice is as good only while that is most of it: it was made for all of them together."""
        if not plan.num_drafted:
            return
        told_token = self._told_token
        num_left = plan.num_drafted
        for i, (state, choice) in enumerate(zip(plan.states, picked, strict=True)):
            if state.num_untold and choice.proposer == _DRAFT:
                state.forgone += plan.gained
                if state.forgone < told_token * state.num_untold:
                    picked[i] = _PLAIN
                    num_left -= 1
        if 2 * num_left < plan.num_drafted:
            picked[:] = [_PLAIN if choice.proposer == _DRAFT else choice for choice in picked]

    @property
    def _told_token(self) -> float:
        """Seconds that the draft takes for a token of a sequence that it is told."""
        return sum(self._proposers[_DRAFT].times.line(1)) / _PROMPT_TOKENS_A_DRAFTED

    def _probe(self, plan: "_Plan", picked: list[Choice]) -> None:
        """Replaces choices by tries of one token, of proposers that are due, as far as what was saved up allows."""
        times, states = plan.times, plan.states
        used = {choice.proposer for choice in picked}
        num_tokens = ceil(plan.best.num_tokens)
        self._dearest_probe = charged = 0.0
        first = self._next_probed % len(states)
        self._next_probed = first + _LOOKED_AT
        begin = {name: sum(proposer.times.line(1)) for name, proposer in self._proposers.items() if name not in used}
        for k in range(first, first + min(_LOOKED_AT, len(states))):
            i = k % len(states)
            choice = picked[i]
            for name, track in states[i].tracks.items():
                if track.next_probe > self._step or choice.proposer == name or not plan.limits[i]:
                    continue
                if name not in self._present:
                    continue
                # Or a share of the next tokens': what is flat there may be so for want of a measurement.
                ahead = min(num_tokens + 4, len(times) - 1)
                seconds = max(times[num_tokens + 1] - times[num_tokens], (times[ahead] - times[num_tokens]) / 4)
                seconds += begin.get(name, 0.0)
                if name == _DRAFT:
                    seconds += self._told_token * states[i].num_untold
                if choice.proposer is not None:
                    lost = sum(gain for _, _, gain, _ in states[i].expected(choice))
                    seconds += lost / plan.best.goodput
                self._dearest_probe = max(self._dearest_probe, seconds)
                if seconds > self._budget:
                    continue
                self._budget -= seconds
                charged += seconds
                self.num_probes += 1
                begin.pop(name, None)
                num_tokens += choice.proposer is None
                picked[i] = Choice(name, 1)
                track.is_probe = True
                track.next_probe = self._step + track.steps_between
                break
        if charged:
            self._without_probes = plan.best.seconds
            self._probes_charged = charged


class _Proposer:
    """What is known of one proposer; outcomes are gathered, and enter the averages together."""

    def __init__(self, max_tokens: int) -> None:
        self.times = ProposalTimes()
        self.overall = Acceptance(max_tokens, None)
        self._size = max_tokens + 1
        self._clear()

    def note(self, num_asked: int, num_drafted: int, num_accepted: int) -> None:
        self._asked[min(num_asked, num_drafted + 1)] += 1
        self._drafted[num_drafted] += 1
        self._verified[min(num_drafted, num_accepted + 1)] += 1
        self._accepted[num_accepted] += 1
        self._has_new = True

    def update(self) -> None:
        if self._has_new:
            self.overall.note_all(Trials(self._asked, self._drafted), Trials(self._verified, self._accepted))
            self._clear()

    def _clear(self) -> None:
        size = self._size
        # By number of tokens: how many proposals.
        self._asked, self._drafted = [0] * size, [0] * size
        self._verified, self._accepted = [0] * size, [0] * size
        self._has_new = False


@dataclass(slots=True)
class _Track:
    """One proposer for one sequence. next_probe: the step from which on it may be tried again. is_probe: its last
    proposal was a try."""

    acceptance: Acceptance
    steps_between: int = 1
    next_probe: int = 0
    is_probe: bool = False


@dataclass(slots=True)
class _Sequence:
    tracks: dict[str, _Track]
    num_asked: int = 0
    num_untold: int = 0
    forgone: float = 0.0

    def expected(self, choice: Choice) -> list[tuple[int, float, float, float]]:
        assert choice.proposer is not None
        return self.tracks[choice.proposer].acceptance.expected()[: choice.num_tokens]


@dataclass(slots=True)
class _Plan:
    """A choice without tries, and what it was made for. It is made anew at the step `ends`. num_drafted: sequences for
    which the draft is asked; gained: for each of them, seconds a step."""

    wanted: list[tuple[int, int]]
    num_others: int
    states: list[_Sequence]
    limits: list[int]
    times: list[float]
    best: Allocation
    picked: list[Choice]
    ends: int
    num_drafted: int
    gained: float
