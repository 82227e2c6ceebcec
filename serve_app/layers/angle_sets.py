"""Which of a rotary table's sets of angles a request is computed with, where a model has several."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class AngleSet:
    """first_row: the row of position 0 in the table. key: what tells K and V under it from those under other sets."""

    first_row: int = 0
    key: bytes = b""


class AngleSets(Protocol):
    """The sets of one model; all calls on the engine's thread.

    A request keeps its set while its blocks are kept: K and V under different sets do not fit together.
    """

    @property
    def are_several(self) -> bool:
        """False: every request has the same, whatever its length."""
        ...

    def take(self, num_prompt: int, num_tokens: int, max_tokens: int) -> AngleSet | None:
        """The set for a request of num_tokens known tokens, num_prompt of them its prompt's, that may get max_tokens.

        None: no room for another one until some set is given back.
        """
        ...

    def share(self, taken: AngleSet) -> None:
        """Counts another request with this set; it is given back once more."""
        ...

    def give_back(self, taken: AngleSet) -> None:
        """Ends a request's use of a set."""
        ...

    def is_outgrown(self, taken: AngleSet, num_tokens: int) -> bool:
        """Whether a request of so many tokens must be computed again, under another set."""
        ...


class OneSet:
    """See AngleSets."""

    are_several = False

    def take(self, num_prompt: int, num_tokens: int, max_tokens: int) -> AngleSet:
        """See AngleSets."""
        return AngleSet()

    def share(self, taken: AngleSet) -> None:
        """See AngleSets."""

    def give_back(self, taken: AngleSet) -> None:
        """See AngleSets."""

    def is_outgrown(self, taken: AngleSet, num_tokens: int) -> bool:
        """See AngleSets."""
        return False


class TwoSets:
    """See AngleSets: one for requests within the original length, one for those beyond it (longrope)."""

    are_several = True

    def __init__(self, original: int) -> None:
        """original: the length; so many rows has the first set."""
        self._short = AngleSet(0, b"short")
        self._long = AngleSet(original, b"long")

    def take(self, num_prompt: int, num_tokens: int, max_tokens: int) -> AngleSet:
        """See AngleSets."""
        return self._short if num_tokens <= self._long.first_row else self._long

    def share(self, taken: AngleSet) -> None:
        """See AngleSets."""

    def give_back(self, taken: AngleSet) -> None:
        """See AngleSets."""

    def is_outgrown(self, taken: AngleSet, num_tokens: int) -> bool:
        """See AngleSets."""
        return taken.first_row == 0 and num_tokens > self._long.first_row


class SetsByLength:
    """See AngleSets: one up to the original length, and beyond it one for each length (dynamic).

    A prompt that is longer than the original length has the set of its own length, as long as it lives. An answer that
    crosses the original length is computed again, once, under the set of the longest that the request may become.
    Requests of the same length share a set; there is room for num_places lengths at a time.
    """

    are_several = True

    def __init__(self, original: int, num_places: int, place_rows: int, fill: Callable[[int, int, int], None]) -> None:
        """original: the length, and the rows of the first set, which the places of place_rows each follow.

        fill(row, length, count): writes the first count rows of the set for a length from a row of the table on.
        """
        self._plain = AngleSet()
        self._original = original
        self._place_rows = place_rows
        self._fill = fill
        self._places: dict[int, _Place] = {}
        self._free = list(range(num_places - 1, -1, -1))

    def take(self, num_prompt: int, num_tokens: int, max_tokens: int) -> AngleSet | None:
        """See AngleSets."""
        if num_tokens <= self._original:
            return self._plain
        length = num_prompt if num_prompt > self._original else max_tokens
        place = self._places.get(length)
        if place is None:
            number = self._place()
            if number is None:
                return None
            taken = AngleSet(self._original + number * self._place_rows, b"length" + length.to_bytes(8, "little"))
            place = self._places[length] = _Place(number, taken)
        if max_tokens > place.num_rows:
            self._fill(place.taken.first_row, length, max_tokens)
            place.num_rows = max_tokens
        place.num_users += 1
        return place.taken

    def share(self, taken: AngleSet) -> None:
        """See AngleSets."""
        if taken.first_row:
            self._places[self._length(taken)].num_users += 1

    def give_back(self, taken: AngleSet) -> None:
        """See AngleSets."""
        if not taken.first_row:
            return
        self._places[self._length(taken)].num_users -= 1

    def is_outgrown(self, taken: AngleSet, num_tokens: int) -> bool:
        """See AngleSets."""
        return taken.first_row == 0 and num_tokens > self._original

    def _place(self) -> int | None:
        """A place that nobody uses: one that was never filled, or else the one that was made first of those left."""
        if self._free:
            return self._free.pop()
        left = next((length for length, place in self._places.items() if not place.num_users), None)
        return None if left is None else self._places.pop(left).number

    @staticmethod
    def _length(taken: AngleSet) -> int:
        return int.from_bytes(taken.key[-8:], "little")


@dataclass(slots=True)
class _Place:
    number: int
    taken: AngleSet
    num_rows: int = 0
    num_users: int = 0
