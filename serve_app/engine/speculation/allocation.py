"""Which tokens of a step are worth drafting: the search behind the control, without its state."""

from collections.abc import Sequence
from dataclasses import dataclass

# One more drafted token for one sequence: (falling worth, position, depth, index, gain, load, seconds).
# falling worth: minus its chance to be accepted once it is proposed: offers are taken in this order, which for one
# sequence is that of positions. depth: of the draft that it needs, 0 for proposers without shared depths. index: of the
# sequence. gain: tokens that it adds to those expected. load: tokens that it adds to the target's step. seconds: what
# asking for it costs. A plain tuple: there are hundreds a step.
Offer = tuple[float, int, int, int, float, float, float]


@dataclass(slots=True)
class Allocation:
    """Of offers the first num_offers, where the draft's depth suffices. expected tokens, of a step that computes
    num_tokens (expected, too) and takes so many seconds with proposals."""

    expected: float
    num_tokens: float
    seconds: float
    offers: Sequence[Offer] = ()
    num_offers: int = 0
    depth: int = 0

    @property
    def goodput(self) -> float:
        """Tokens a second."""
        return self.expected / self.seconds

    def count(self, num_sequences: int) -> list[int]:
        """Drafted tokens for each of the sequences."""
        counts = [0] * num_sequences
        for _, _, depth, index, _, _, _ in self.offers[: self.num_offers]:
            if depth <= self.depth:
                counts[index] += 1
        return counts


def add_best(
    plain: Allocation, offers: Sequence[Offer], times: Sequence[float], depth: int, draft_seconds: float
) -> Allocation:
    """What the best number of the sorted offers adds to a step without any, with so much spent on the draft.

    times: seconds of a step by its number of tokens.
    """
    expected, num_tokens, extra = plain.expected, plain.num_tokens, draft_seconds
    num_taken = 0
    best = plain.expected, plain.num_tokens, plain.seconds + draft_seconds
    highest = best[0] / best[2]
    # Not only until goodput falls: a step's time is flat, and then jumps.
    for taken, (_, _, needed, _, gain, load, seconds) in enumerate(offers, 1):
        if needed > depth:
            continue
        expected += gain
        num_tokens += load
        extra += seconds
        whole = int(num_tokens)
        low = times[whole]
        total = low + (times[whole + 1] - low) * (num_tokens - whole) + extra
        if expected > highest * total:
            highest, num_taken = expected / total, taken
            best = expected, num_tokens, total
    return Allocation(*best, offers, num_taken, depth)


def add_best_depth(
    plain: Allocation, offers: Sequence[Offer], times: Sequence[float], draft_seconds: Sequence[float], at_least: float
) -> Allocation | None:
    """The best of add_best over all depths of the draft; draft_seconds[d]: what depth d takes. None where no depth
    gives a goodput over at_least.

    A depth costs the draft the same for one sequence and for all, so depths are compared as wholes.
    """
    gains = [0.0] * len(draft_seconds)
    for _, _, depth, _, gain, _, _ in offers:
        gains[depth] += gain
    bounds = []
    expected = plain.expected + gains[0]
    for depth in range(1, len(draft_seconds)):
        expected += gains[depth]
        bounds.append((expected / (plain.seconds + draft_seconds[depth]), depth))
    # The most promising first: its result rules out most of the others.
    bounds.sort(reverse=True)
    best = None
    for bound, depth in bounds:
        if bound <= at_least:
            break
        found = add_best(plain, offers, times, depth, draft_seconds[depth])
        if found.goodput > at_least:
            best, at_least = found, found.goodput
    return best
