"""Prompt lookup: a sequence that repeats itself goes on as it did before.

Source: Saxena, Prompt Lookup Decoding (2023). The longest n-gram that ends the sequence and occurred before in it is
looked for, and what followed its latest occurrence is proposed.
"""

from collections.abc import Callable, Sequence

from serve_app.engine.speculation.proposer import DraftWish, no_work

_BITS = 32


class NgramProposer:
    """Proposes what followed the latest earlier occurrence of the last tokens: of max_n, or of as many as occurred, but
    of min_n at least.

    Each token is indexed once, when it is first seen; sequences share nothing.
    """

    name = "ngram"
    is_open = True
    num_timeouts = 0

    def __init__(self, min_n: int = 2, max_n: int = 4) -> None:
        assert 1 <= min_n <= max_n
        self._min_n, self._max_n = min_n, max_n
        self._indexes: dict[int, _Index] = {}

    def admit(self, sequence: int, token_ids: Sequence[int], scope: bytes = b"") -> None:
        """See Proposer."""
        self._index(sequence).extend(token_ids)

    def propose(self, wishes: Sequence[DraftWish], meanwhile: Callable[[], None] = no_work) -> list[list[int]]:
        """See Proposer."""
        return [self._propose(wish) for wish in wishes]

    def forget(self, sequence: int, token_ids: Sequence[int] = ()) -> None:
        """See Proposer."""
        self._indexes.pop(sequence, None)

    def close(self) -> None:
        """See Proposer."""
        self._indexes.clear()

    def _index(self, sequence: int) -> "_Index":
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = _Index(self._min_n, self._max_n)
        return index

    def _propose(self, wish: DraftWish) -> list[int]:
        tokens = wish.token_ids
        index = self._index(wish.sequence)
        index.extend(tokens)
        start = index.find(tokens)
        if start is None:
            return []
        proposed = list(tokens[start : start + wish.max_tokens])
        # What followed reaches the end of the sequence: there the proposal itself goes on, with the period of the
        # repetition.
        period = len(tokens) - start
        while len(proposed) < wish.max_tokens:
            proposed.append(proposed[-period])
        return proposed


class _Index:
    """Where n-grams of one sequence occurred: for each length, n-gram -> the position after its latest occurrence.

    A longer n-gram is only entered once the shorter one at its end has occurred twice, so text that does not repeat
    itself takes one entry a token. An n-gram's key is its ids side by side in one integer, the last id lowest.
    """

    __slots__ = ("_length", "_min_n", "_tables")

    def __init__(self, min_n: int, max_n: int) -> None:
        self._min_n = min_n
        self._tables: list[dict[int, int]] = [{} for _ in range(min_n, max_n + 1)]
        self._length = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Enters the n-grams that the new ones among the tokens follow."""
        for end in range(max(self._length, self._min_n), len(tokens)):
            n = self._min_n
            key = self._key(tokens, end)
            for table in self._tables:
                before = table.get(key)
                table[key] = end
                if before is None:
                    break
                n += 1
                if n - self._min_n < len(self._tables) and before >= n:
                    # Does nothing but for the first occurrence of the shorter one, which was not entered here.
                    longer = key | tokens[before - n] << _BITS * (n - 1)
                    self._tables[n - self._min_n].setdefault(longer, before)
                if end < n:
                    break
                key |= tokens[end - n] << _BITS * (n - 1)
        self._length = max(self._length, len(tokens))

    def find(self, tokens: Sequence[int]) -> int | None:
        """The position after the latest occurrence of the longest known n-gram that ends the tokens."""
        end = len(tokens)
        if end < self._min_n:
            return None
        found: int | None = None
        n = self._min_n
        key = self._key(tokens, end)
        for table in self._tables:
            position = table.get(key)
            if position is None:
                break
            found = position
            n += 1
            if end < n:
                break
            key |= tokens[end - n] << _BITS * (n - 1)
        return found

    def _key(self, tokens: Sequence[int], end: int) -> int:
        key = 0
        for i in range(end - self._min_n, end):
            key = key << _BITS | tokens[i]
        return key
