"""A draft model with another vocabulary: what it reads and what it says go through text."""

import codecs
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from serve_app.engine.speculation.draft_call import DraftCall, Drafted, DraftModel
from serve_app.text.tokenizer import Tokenizer

_WINDOW = 32
"""Target tokens at the end of a text whose words are read anew in each call: a longer text may cut them otherwise."""
_EXTRA_TOKENS = 2
"""Of the target, drafted beyond those wanted: words differ in length, and the last may be cut short."""


@dataclass(slots=True)
class _MappedText:
    """ids: of the target. The first num_settled of them are, for good, the draft's `settled`; told: what the draft
    model was told last."""

    ids: list[int] = field(default_factory=list)
    num_settled: int = 0
    settled: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)


class TextMappedDraft:
    """See DraftModel: in the target's ids, over a model in its own.

    The target verifies ids: a text that one of the two cuts in another way only costs proposals. Control tokens have no
    text, the draft does not see them.
    """

    def __init__(self, model: DraftModel, own: Tokenizer, target: Tokenizer) -> None:
        """Owns the model. own: its tokenizer. Both can encode."""
        self._model = model
        self._own = own
        self._target = target
        self._texts: dict[Hashable, _MappedText] = {}

    def propose(self, calls: Sequence[DraftCall], until_s: float | None = None) -> list[Drafted]:
        """See DraftModel."""
        answers: list[Drafted] = [None] * len(calls)
        asked: list[tuple[int, _MappedText, DraftCall]] = []
        for i, call in enumerate(calls):
            text = self._tell(call.sequence, call.token_ids, call.base)
            if text is None:
                continue
            answers[i] = []
            change = self._change(text)
            if change is not None:
                # As many of the draft's tokens as make so many of the target's, by what they were so far.
                wanted = -(-(call.max_tokens + _EXTRA_TOKENS) * len(text.told) // len(text.ids))
                asked.append((i, text, DraftCall(call.sequence, *change, wanted)))
        for (i, text, _), drafted in zip(asked, self._model.propose([c for *_, c in asked], until_s), strict=True):
            if drafted is None:
                # Told again from the beginning, by a caller that then does the same.
                del self._texts[calls[i].sequence]
                answers[i] = None
            else:
                answers[i] = self._to_target(text.ids, drafted)[: calls[i].max_tokens]
        return answers

    def feed(self, sequence: Hashable, token_ids: Sequence[int], offset: int) -> None:
        """See DraftModel."""
        text = self._tell(sequence, token_ids, offset)
        change = None if text is None else self._change(text)
        if change is not None:
            base, ids = change
            self._model.feed(sequence, ids, base)

    def advance(self) -> bool:
        """See DraftModel."""
        return self._model.advance()

    def forget(self, sequence: Hashable) -> None:
        """See DraftModel."""
        self._texts.pop(sequence, None)
        self._model.forget(sequence)

    def close(self) -> None:
        """See DraftModel."""
        self._model.close()

    def _tell(self, sequence: Hashable, token_ids: Sequence[int], base: int) -> _MappedText | None:
        text = self._texts.get(sequence)
        if text is None:
            if base:
                return None
            # The model may know it from an earlier life of this one.
            self._model.forget(sequence)
            text = self._texts[sequence] = _MappedText()
        if base > len(text.ids):
            return None
        if base < text.num_settled:
            text.num_settled = 0
            text.settled.clear()
        text.ids[base:] = token_ids
        return text

    def _change(self, text: _MappedText) -> tuple[int, list[int]] | None:
        """The draft's ids of a text as (how many of those told still hold, those that follow); None: it ends inside of
        a character."""
        self._settle(text)
        rest = self._encode(text, len(text.ids))
        if rest is None:
            return None
        ids = [*text.settled, *rest]
        count = len(text.settled)
        base = count if text.told[:count] == text.settled else 0
        for told, new in zip(text.told[base:], ids[base:], strict=False):
            if told != new:
                break
            base += 1
        text.told = ids
        return base, ids[base:]

    def _settle(self, text: _MappedText) -> None:
        """Leaves but a window to be read anew. Texts without spaces are read as a whole each time."""
        if len(text.ids) - text.num_settled < 2 * _WINDOW:
            return
        for end in range(len(text.ids) - _WINDOW, text.num_settled, -1):
            if self._target.token_bytes(text.ids[end]).startswith(b" "):
                settled = self._encode(text, end)
                if settled is not None:
                    text.settled += settled
                    text.num_settled = end
                return

    def _encode(self, text: _MappedText, end: int) -> list[int] | None:
        """The draft's ids from what is settled up to a target token; None where that is inside of a character."""
        chars = _whole_text(self._target, text.ids[text.num_settled : end])
        if chars is None:
            return None
        start = [] if text.num_settled or not self._own.add_bos or self._own.bos_id is None else [self._own.bos_id]
        if not text.num_settled and self._target.strips_space:
            chars = chars.removeprefix(" ")
        elif self._own.strips_space:
            # Encoding puts one before it.
            chars = chars.removeprefix(" ")
        return start + self._own.encode(chars, add_special=False)

    def _to_target(self, ids: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """What was drafted behind ids, in the target's ids; [] where the target would cut the text otherwise."""
        target = self._target
        end = next((i for i, token in enumerate(drafted) if token in self._own.special_ids), len(drafted))
        added = _known_text(b"".join(map(self._own.token_bytes, drafted[:end])))
        # From the last word on: what is drafted may go on inside of it.
        start = next((i for i in range(len(ids) - 1, -1, -1) if target.token_bytes(ids[i]).startswith(b" ")), 0)
        while start < len(ids) and not target.token_bytes(ids[start]):
            start += 1
        word = list(ids[start:])
        before = _whole_text(target, word)
        if before is None or not added:
            return []
        chars = before + added
        if target.strips_space:
            chars = chars.removeprefix(" ")
        found = target.encode(chars, add_special=False)
        return found[len(word) :] if found[: len(word)] == word else []


def _whole_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """None where it ends inside of a character."""
    raw = b"".join(map(tokenizer.token_bytes, ids))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    chars = decoder.decode(raw)
    return None if decoder.getstate()[0] else chars


def _known_text(raw: bytes) -> str:
    """Up to the last whole character."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)
