"""The draws of a step whose requests have drafts: a proposed token counts if and only if it is the one drawn there.

One that was sampled, and says what from, takes part in the draw: where it is accepted it is what is drawn.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.batch import Drafts
from serve_app.engine.logits_ops import Logits, Proposed
from serve_app.engine.sampler import Sampled, Sampler, StepLogprobs

Ints = NDArray[np.int64]


@dataclass(slots=True)
class Verified:
    """counts [S] int64: tokens drawn for each request, 1 or more; sampled: all of them, request by request."""

    counts: Ints
    sampled: Sampled


def verify(sampler: Sampler, logits: Logits, rows: Ints, positions: Ints, drafts: Drafts) -> Verified:
    """Draws for each request the tokens that plain decoding would, as long as the drafts before them were right.

    logits [S + sum(counts), vocab] float32, request by request, one row behind the last known token and one behind each
    proposed one (overwritten); rows, positions [S] as Sampler.sample takes them, of the first token to be drawn. Every
    draw is Sampler.sample's own: with its seed and position, and with what the tokens before it left behind. So the
    text is the one without drafts, or, where drafts have chances, one of the same law. Both ways accept as Leviathan et
    al. 2023, algorithm 1, does: the former for one-hot proposals.
    """
    drawing = _Drawing(sampler, logits, rows, positions, drafts)
    are_free = sampler.draws_freely(rows)
    if are_free.any():
        drawing.draw_at_once(np.flatnonzero(are_free))
    drawing.draw_in_turn(np.flatnonzero(~are_free))
    return drawing.result()


class _Drawing:
    """Draws collected by request and place."""

    def __init__(self, sampler: Sampler, logits: Logits, rows: Ints, positions: Ints, drafts: Drafts) -> None:
        self._sampler = sampler
        self._logits = logits
        self._rows = rows
        self._positions = positions
        self._drafts = drafts.counts
        count = len(rows)
        self._first = np.arange(count) + np.cumsum(drafts.counts) - drafts.counts
        # By row of logits; behind the last proposed token nothing is right.
        self._proposed = np.full(count + len(drafts.token_ids), -1, np.int64)
        self._proposed[_spans(self._first, drafts.counts)] = drafts.token_ids
        self._chances = drafts.chances
        # By row of logits, too: where among the chances those of its token are.
        self._chances_at = np.full(len(self._proposed), -1, np.int64)
        if drafts.chances is not None:
            places = drafts.chances.places
            self._chances_at[_spans(self._first, drafts.counts)[places]] = np.arange(len(places))
        self._drawn = np.full(len(self._proposed), -1, np.int64)
        self._counts = np.zeros(count, np.int64)
        self._logprobs: list[tuple[Ints, StepLogprobs]] = []

    def draw_at_once(self, who: Ints) -> None:
        """Requests whose draws do not depend on each other: all of them, right drafts or not."""
        lengths = self._drafts[who] + 1
        at = _spans(self._first[who], lengths)
        owner = np.repeat(who, lengths)
        self._draw(at, owner)
        # Each request's last place has no proposal, so that it is always wrong: the first wrong one from its begin on.
        wrong = np.flatnonzero(self._drawn[at] != self._proposed[at])
        begins = np.cumsum(lengths) - lengths
        self._counts[who] = wrong[np.searchsorted(wrong, begins)] - begins + 1

    def draw_in_turn(self, who: Ints) -> None:
        """Place after place, the requests whose drafts were right so far."""
        place = 0
        while len(who):
            at = self._first[who] + place
            self._draw(at, who)
            self._counts[who] += 1
            who = who[self._drawn[at] == self._proposed[at]]
            place += 1

    def _draw(self, at: Ints, owner: Ints) -> None:
        logits, rows = self._logits[at], self._rows[owner]
        positions = self._positions[owner] + at - self._first[owner]
        draw = self._sampler.sample(logits, rows, positions, self._sampled(at, rows))
        sampled = draw.wait()
        self._drawn[at] = sampled.token_ids
        if sampled.logprobs is not None:
            self._logprobs.append((at, sampled.logprobs))

    def _sampled(self, at: Ints, rows: Ints) -> tuple[Ints, Proposed] | None:
        """Of the rows of logits at those whose proposed tokens have chances, as Sampler.sample takes them."""
        if self._chances is None:
            return None
        who = np.flatnonzero((self._chances_at[at] >= 0) & self._sampler.is_random(rows))
        if not len(who):
            return None
        found = self._chances_at[at[who]]
        return who, (self._proposed[at[who]], self._chances.candidates[found], self._chances.chances[found])

    def result(self) -> Verified:
        kept = _spans(self._first, self._counts)
        return Verified(self._counts, Sampled(self._drawn[kept], self._joined_logprobs(kept)))

    def _joined_logprobs(self, kept: Ints) -> StepLogprobs | None:
        if not self._logprobs:
            return None
        count, width = len(self._drawn), max(part.top_ids.shape[1] for _, part in self._logprobs)
        chosen = np.full(count, np.nan, np.float32)
        top_ids = np.full((count, width), -1, np.int64)
        top_logprobs = np.full((count, width), np.nan, np.float32)
        for at, part in self._logprobs:
            k = part.top_ids.shape[1]
            chosen[at], top_ids[at, :k], top_logprobs[at, :k] = part.chosen, part.top_ids, part.top_logprobs
        return StepLogprobs(chosen[kept], top_ids[kept], top_logprobs[kept])


def _spans(starts: Ints, lengths: Ints) -> Ints:
    """starts[0], starts[0] + 1, …, lengths[0] of them, then those from starts[1] on, and so on."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
