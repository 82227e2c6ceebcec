"""A target and its proposers as numbers: times are summed, not waited for, and outcomes are drawn."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.engine.speculation.control import Choice, SpeculationControl

# (sequence, proposer, step) -> the chance of each drafted token.
Acceptance = Callable[[int, str, int], float]


@dataclass
class Simulation:
    """num_sequences decode for good. step_seconds(tokens) is the target's time; costs: proposer -> (begin, each depth).

    rates: how often a proposer has anything to say, where not always. noise: the spread of measured times; one in 200
    is an accident that takes five times as long.
    """

    num_sequences: int
    acceptance: Acceptance
    step_seconds: Callable[[int], float]
    costs: Mapping[str, tuple[float, float]]
    rates: Mapping[str, float] = field(default_factory=dict)
    noise: float = 0.03
    seed: int = 1
    step: int = 0
    seconds: float = 0.0
    num_tokens: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def measured(self, seconds: float) -> float:
        """The time with noise."""
        factor = self.random.lognormvariate(0, self.noise)
        return seconds * factor * (5 if self.random.random() < 0.005 else 1)

    def run(self, control: SpeculationControl, num_steps: int, most: int = 8) -> float:
        """Tokens a second over so many steps, by true times."""
        seconds, num_tokens = self.seconds, self.num_tokens
        for _ in range(num_steps):
            self.run_step(control, control.choose([(i, most) for i in range(self.num_sequences)], 0))
        return (self.num_tokens - num_tokens) / (self.seconds - seconds)

    def run_step(self, control: SpeculationControl, choices: Sequence[Choice]) -> None:
        """Draws what becomes of the choices, and tells the control."""
        total = self.num_sequences
        outcomes = []
        for i, choice in enumerate(choices):
            if choice.proposer is None:
                continue
            drafted = choice.num_tokens if self.random.random() < self.rates.get(choice.proposer, 1.0) else 0
            rate = self.acceptance(i, choice.proposer, self.step)
            accepted = next((j for j in range(drafted) if self.random.random() >= rate), drafted)
            outcomes.append((i, choice.proposer, drafted, accepted))
            total += drafted
            # What is to be expected, not what was drawn: less noise in what tests compare.
            self.num_tokens += self.rates.get(choice.proposer, 1.0) * sum(
                rate**j for j in range(1, choice.num_tokens + 1)
            )
        for name in sorted({choice.proposer for choice in choices if choice.proposer}):
            asked = [choice.num_tokens for choice in choices if choice.proposer == name]
            seconds = self.costs[name][0] + self.costs[name][1] * max(asked)
            self.seconds += seconds
            control.note_proposal(name, len(asked), max(asked), self.measured(seconds))
        seconds = self.step_seconds(total)
        self.seconds += seconds
        control.note_step(self.num_sequences, total, self.measured(seconds))
        for outcome in outcomes:
            control.note_outcome(*outcome)
        self.num_tokens += self.num_sequences
        self.step += 1
