"""How far a proposer's tokens are accepted, by their position in a proposal."""

from collections.abc import Sequence
from math import sqrt

# Trials that an average of one sequence, or of all, remembers, and those that the wider average counts as in it.
SEQUENCE_MEMORY = 64
OVERALL_MEMORY = 256
_WIDER_WEIGHT = 4.0
# A proposer that nobody knows, as so many trials.
_UNKNOWN = 0.5
_UNKNOWN_WEIGHT = 2.0
# Where the first position's last few outcomes say otherwise than its average, that starts anew from these few.
_QUICK_RATE = 1 / 6
_QUICK_SPREAD = 3 * sqrt(_QUICK_RATE / (2 - _QUICK_RATE))
_WEIGHT_AFTER_CHANGE = 4.0
_NOTES_A_VERSION = 16
# Of positions that are no longer tried: what is known of them gets old.
_UNTRIED_KEPT = 0.98


class Trials:
    """By position: how often something was tried there, and succeeded."""

    __slots__ = ("num_succeeded", "num_tried")

    def __init__(self, reached: Sequence[int], succeeded: Sequence[int]) -> None:
        """reached[k], succeeded[k]: how often the first k positions were tried, or succeeded; [positions + 1]."""
        self.num_tried = _at_least(reached)
        self.num_succeeded = _at_least(succeeded)


def _at_least(histogram: Sequence[int]) -> list[int]:
    """[j]: how many are over j."""
    total = 0
    sums = []
    for count in reversed(histogram[1:]):
        total += count
        sums.append(total)
    return sums[::-1]


class Acceptance:
    """Moving averages of one proposer, of one sequence (wider: that of all sequences) or of all (wider None).

    accepted[j]: how often a token at position j is accepted given that it was proposed and those before it were
    accepted, first that at position 0. offered[j]: how often a token is proposed there when it was asked for and those
    before it were proposed.
    """

    __slots__ = (
        "_accepted",
        "_accepted_weight",
        "_expected",
        "_is_stale",
        "_memory",
        "_offered",
        "_offered_weight",
        "_quick",
        "_totals",
        "_wider",
        "_wider_changes",
        "_wider_version",
        "accepted",
        "first",
        "num_changes",
        "num_noted",
        "offered",
    )

    def __init__(self, max_tokens: int, wider: "Acceptance | None") -> None:
        self._wider = wider
        self._memory = OVERALL_MEMORY if wider is None else SEQUENCE_MEMORY
        self._accepted = [0.0] * max_tokens
        self._accepted_weight = [0.0] * max_tokens
        self._offered = [0.0] * max_tokens
        self._offered_weight = [0.0] * max_tokens
        self._quick: float = _UNKNOWN if wider is None else wider.first
        self.num_changes = 0
        self.num_noted = 0
        self._wider_changes = 0 if wider is None else wider.num_changes
        self.first: float = self._quick
        # Of the wider only: the estimates that those of sequences are drawn toward.
        self.accepted = [_UNKNOWN] * max_tokens
        self.offered = [1.0] * max_tokens
        self._expected: list[tuple[int, float, float, float]] = []
        self._totals = 0.0, 0.0
        self._wider_version = 0
        self._is_stale = True

    @property
    def version(self) -> int:
        """Changes when the averages may have changed by something that matters to those of single sequences."""
        return self.num_noted // _NOTES_A_VERSION + self.num_changes

    def note(self, num_asked: int, num_drafted: int, num_accepted: int) -> None:
        """One proposal's outcome."""
        self.num_noted += 1
        memory = self._memory
        if self._wider is not None and self._wider_changes != self._wider.num_changes:
            self._wider_changes = self._wider.num_changes
            self._doubt()
        values, weights = self._offered, self._offered_weight
        for j in range(min(num_asked, num_drafted + 1, len(values))):
            weight = weights[j] = weights[j] + 1 if weights[j] < memory - 1 else memory
            values[j] += ((j < num_drafted) - values[j]) / weight
        values, weights = self._accepted, self._accepted_weight
        num_tried = min(num_drafted, num_accepted + 1, len(values))
        for j in range(num_tried):
            weight = weights[j] = weights[j] + 1 if weights[j] < memory - 1 else memory
            values[j] += ((j < num_accepted) - values[j]) / weight
        for j in range(num_tried, len(values)):
            weights[j] *= _UNTRIED_KEPT
        if num_drafted:
            self._look_for_change(num_accepted > 0, 1)
        self._is_stale = True

    def note_all(self, offered: "Trials", accepted: "Trials") -> None:
        """Many proposals' outcomes at once, in the wider average."""
        if not offered.num_tried[0]:
            return
        self.num_noted += offered.num_tried[0]
        for trials, values, weights in (
            (offered, self._offered, self._offered_weight),
            (accepted, self._accepted, self._accepted_weight),
        ):
            for j, (tried, succeeded) in enumerate(zip(trials.num_tried, trials.num_succeeded, strict=True)):
                if tried:
                    weights[j] = max(min(weights[j] + tried, self._memory), tried)
                    values[j] += (succeeded - tried * values[j]) / weights[j]
                else:
                    weights[j] *= _UNTRIED_KEPT
        if accepted.num_tried[0]:
            self._look_for_change(accepted.num_succeeded[0], accepted.num_tried[0])
        self._is_stale = True

    def expected(self) -> list[tuple[int, float, float, float]]:
        """For each position j what asking for it, beside those before it, adds: (j, minus the chance that it is
        accepted once it is proposed, accepted tokens, proposed tokens)."""
        if self._is_stale or (self._wider is not None and self._wider_version != self._wider.version):
            self._estimate()
        return self._expected

    def totals(self) -> tuple[float, float]:
        """Accepted and proposed tokens to be expected where all positions are asked for."""
        self.expected()
        return self._totals

    def _look_for_change(self, num_succeeded: int, num_tried: int) -> None:
        rate = _QUICK_RATE if num_tried == 1 else 1 - (1 - _QUICK_RATE) ** num_tried
        self._quick += rate * (num_succeeded / num_tried - self._quick)
        first = self.first
        if abs(self._quick - first) > _QUICK_SPREAD * sqrt(first * (1 - first) + 0.01):
            self._doubt()
            self._accepted[0] = self._quick
            self.num_changes += 1

    def _doubt(self) -> None:
        self._accepted_weight = [min(weight, _WEIGHT_AFTER_CHANGE) for weight in self._accepted_weight]
        self._offered_weight = [min(weight, _WEIGHT_AFTER_CHANGE) for weight in self._offered_weight]

    def _estimate(self) -> None:
        """accepted, offered and what follows of them: the averages, drawn toward the wider ones (or, where there are
        none, those of a position toward the ones of the position before)."""
        wider = self._wider
        if wider is not None:
            wider.expected()
            self._wider_version = wider.version
            prior, rates, shares = _WIDER_WEIGHT, wider.accepted, wider.offered
        else:
            prior, rates, shares = _UNKNOWN_WEIGHT, self.accepted, self.offered
        rate, share, chance, load, gains, loads = _UNKNOWN, 1.0, 1.0, 1.0, 0.0, 0.0
        expected = []
        known = self._accepted, self._accepted_weight, self._offered, self._offered_weight
        for j, (accepted, weight, offered, offered_weight) in enumerate(zip(*known, strict=True)):
            if wider is not None:
                rate, share = rates[j], shares[j]
            rate = (accepted * weight + rate * prior) / (weight + prior)
            share = (offered * offered_weight + share * prior) / (offered_weight + prior)
            load *= share
            chance *= rate
            gain = chance * load
            gains += gain
            loads += load
            expected.append((j, -chance, gain, load))
            if wider is None:
                rates[j], shares[j] = rate, share
        self.first = -expected[0][1]
        self._expected, self._totals = expected, (gains, loads)
        self._is_stale = False
