"""Proposals from all texts of a replica: what most often followed the end of a sequence, here or in another one.

Source: Oliaro et al., SuffixDecoding (2024), whose two trees, of a request and of all, are one trie here.
"""

from collections import deque
from collections.abc import Callable, Sequence

from serve_app.engine.speculation.proposer import DraftWish, no_work
from serve_app.engine.speculation.suffix_trie import SuffixTrie, Text

# Tokens that enter the index in one call, one to two milliseconds of work: a long prompt enters it over several steps.
_TOKENS_PER_CALL = 256


class SuffixProposer:
    """Proposes the most frequent continuation of the longest suffix that occurred before, while it is likely enough.

    Prompts and outputs are indexed, max_tokens of them at most. Finished sequences make room, the ones that finished
    first before others; where running ones fill the index, what they go on with is neither indexed nor proposed for.

    A token that followed c of n occurrences of the m tokens before it counts as likely as c / (n + 1 / m): one
    occurrence of a long text tells more than one of a word. A proposal ends where the product falls under
    min_probability; so from a text that occurred once it is at most 1 / min_probability - 1 times as long as what
    matches.
    """

    name = "suffix"
    is_open = True
    num_timeouts = 0

    def __init__(self, max_tokens: int = 131_072, depth: int = 16, min_probability: float = 0.25) -> None:
        self._max_tokens = max_tokens
        self._min_probability = min_probability
        self._depth = depth
        self.close()

    @property
    def num_tokens(self) -> int:
        """Tokens in the index."""
        return self._num_tokens

    @property
    def num_nodes(self) -> int:
        """Nodes of the index, about 160 bytes each."""
        return self._trie.num_nodes

    def admit(self, sequence: int, token_ids: Sequence[int], scope: bytes = b"") -> None:
        """See Proposer. Sequences see nothing of those of another scope: the salt of a tenant's cache."""
        text = self._admit(sequence, scope)
        _append(text, token_ids)
        self._behind.append((text, False))
        self._catch_up(_TOKENS_PER_CALL)

    def propose(self, wishes: Sequence[DraftWish], meanwhile: Callable[[], None] = no_work) -> list[list[int]]:
        """See Proposer."""
        left = _TOKENS_PER_CALL
        texts = []
        for wish in wishes:
            text = self._running.get(wish.sequence) or self._admit(wish.sequence, b"")
            _append(text, wish.token_ids)
            left -= self._index(text, left)
            texts.append(text)
        self._catch_up(left)
        # Only now, so that all know what all others said last.
        return [self._continue(text, wish.max_tokens) for text, wish in zip(texts, wishes, strict=True)]

    def forget(self, sequence: int, token_ids: Sequence[int] = ()) -> None:
        """See Proposer. token_ids: all of the sequence where they are known, for what was said after its last wish."""
        text = self._running.pop(sequence, None)
        if text is not None:
            _append(text, token_ids)
            self._behind.append((text, True))
            self._catch_up(_TOKENS_PER_CALL)

    def close(self) -> None:
        """See Proposer."""
        self._trie = SuffixTrie(self._depth)
        self._roots: dict[bytes, int] = {}
        self._scopes: dict[int, bytes] = {}
        self._running: dict[int, Text] = {}
        self._finished: deque[Text] = deque()
        # Texts with tokens that may not be in the index yet, and whether they finish with these.
        self._behind: deque[tuple[Text, bool]] = deque()
        self._num_tokens = 0

    def _admit(self, sequence: int, scope: bytes) -> Text:
        root = self._roots.get(scope)
        if root is None:
            root = self._roots[scope] = self._trie.add_root()
            self._scopes[root] = scope
        text = self._running[sequence] = self._trie.new_text(root)
        return text

    def _catch_up(self, max_tokens: int) -> None:
        while self._behind:
            text, is_last = self._behind[0]
            max_tokens -= self._index(text, max_tokens)
            if text.num_indexed < len(text.tokens):
                return
            self._behind.popleft()
            if is_last:
                self._trie.end(text)
                self._finished.append(text)

    def _index(self, text: Text, max_tokens: int) -> int:
        """Enters so many of the text's tokens at most; how many were."""
        begin = text.num_indexed
        for _ in range(min(max_tokens, len(text.tokens) - begin)):
            if self._num_tokens >= self._max_tokens and not self._remove_oldest():
                self._trie.end(text)
                break
            self._trie.index_next(text)
            self._num_tokens += 1
        return text.num_indexed - begin

    def _remove_oldest(self) -> bool:
        """Removes one token of the text that finished first, unless there is none."""
        while self._finished:
            text = self._finished[0]
            has_left = text.num_removed < text.num_indexed
            if has_left:
                self._trie.remove_next(text)
                self._num_tokens -= 1
            if text.num_removed == text.num_indexed:
                self._finished.popleft()
                self._trie.drop(text)
                if not self._trie.is_used(text.root):
                    self._trie.drop_root(text.root)
                    del self._roots[self._scopes.pop(text.root)]
            if has_left:
                return True
        return False

    def _continue(self, text: Text, max_tokens: int) -> list[int]:
        proposed: list[int] = []
        if text.num_indexed < len(text.tokens):
            return proposed
        probability = 1.0
        for token, count, total, length in self._trie.continuation(text):
            probability *= count / (total + 1 / length)
            if probability < self._min_probability:
                break
            proposed.append(token)
            if len(proposed) == max_tokens:
                break
        return proposed


def _append(text: Text, token_ids: Sequence[int]) -> None:
    """Gives a text the tokens that it lacks of all that are known."""
    if not text.is_ended:
        text.tokens.extend(token_ids[len(text.tokens) :])
