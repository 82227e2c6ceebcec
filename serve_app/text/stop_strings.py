"""Finds stop strings in a stream of text, character by character, without ever looking back."""

from functools import lru_cache
from typing import Final

_ROOT: Final = 0


class StopStrings:
    """An automaton (Aho-Corasick) over some stop strings; one serves any number of streams.

    A state is the longest end of the text so far that a stop string begins with: `depth[state]` characters, which
    must not be sent yet. Building costs O(sum of the lengths).
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.depth: list[int] = [0]
        self.first_chars = frozenset(s[0] for s in stops if s)
        self._next: list[dict[str, int]] = [{}]
        self._fallback: list[int] = [_ROOT]
        self._found: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        following = self._next
        while char not in following[state]:
            if state == _ROOT:
                return _ROOT
            state = self._fallback[state]
        return following[state][char]

    def found(self, state: int) -> str | None:
        """The stop string that the text now ends with; the longest if there are several."""
        return self._found[state]

    def _insert(self, stop: str) -> None:
        state = _ROOT
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fallback.append(_ROOT)
                self._found.append(None)
                self.depth.append(self.depth[state] + 1)
            state = self._next[state][char]
        if state != _ROOT:
            self._found[state] = stop

    def _link(self) -> None:
        """Sets the fallbacks breadth first: a state's own is at a smaller depth, so it is there already."""
        queue = list(self._next[_ROOT].values())
        for state in queue:
            for char, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], char)
                if self._found[child] is None:
                    self._found[child] = self._found[self._fallback[child]]
                queue.append(child)


@lru_cache(maxsize=256)
def stop_strings(stops: tuple[str, ...]) -> StopStrings:
    """The automaton of some stop strings; clients send the same ones again and again."""
    return StopStrings(stops)
