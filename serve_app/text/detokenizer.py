"""Token ids to text as they come: never half a character, never what may yet turn out to be a stop string."""

import codecs
from collections.abc import Sequence

from serve_app.text.stop_strings import stop_strings
from serve_app.text.tokenizer import Tokenizer

_INCREMENTAL_UTF8 = codecs.getincrementaldecoder("utf-8")


class DetokenizerTable:
    """The tokens of one model, ready for decoding; built once and shared by all its requests.

    texts: id → its text, or None where its bytes are no whole characters. pieces: id → its bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.strips_space = tokenizer.strips_space
        self.pieces: list[bytes] = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.texts: list[str | None] = [_whole_text(piece) for piece in self.pieces]

    def piece(self, token_id: int) -> bytes:
        """b"" for the ids that a padded embedding has beyond the vocabulary."""
        return self.pieces[token_id] if token_id < len(self.pieces) else b""


class Detokenizer:
    """The text of one choice of a request.

    What push and flush return, joined, is what decode(prompt_ids + output) has beyond decode(prompt_ids), up to the
    first stop string to be completed: a completion keeps its leading space exactly where it continues a text.
    """

    __slots__ = ("_decoder", "_held", "_is_plain", "_state", "_stops", "_strips", "_table", "_texts", "stopped_by")

    def __init__(self, table: DetokenizerTable, stop: tuple[str, ...], prompt_ids: Sequence[int]) -> None:
        self._table = table
        self._texts = table.texts
        self._decoder = _INCREMENTAL_UTF8("replace")
        self._stops = stop_strings(stop) if any(stop) else None
        self._state = 0
        self._held = ""
        self._strips = table.strips_space and not any(table.piece(i) for i in prompt_ids)
        self.stopped_by: str | None = None
        self._decoder.decode(_incomplete_end(table, prompt_ids))
        # True: no bytes are pending, nothing is to be stripped, and there are no stop strings.
        self._is_plain = self._stops is None and not self._strips and not self._decoder.getstate()[0]

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Adds a token; the text that is now certain, "" after a stop.

        may_stop=False lets a stop string pass (min_tokens is not reached yet).
        """
        if self._is_plain:
            try:
                text = self._texts[token_id]
            except IndexError:
                return ""
            if text is not None:
                return text
        return self._push_slowly(token_id, may_stop)

    def flush(self) -> str:
        """At the end: what was held back. An unfinished character becomes one U+FFFD."""
        if self.stopped_by is not None:
            return ""
        text = self._unheld(self._stripped(self._decoder.decode(b"", final=True)), may_stop=True)
        if self.stopped_by is None:
            text += self._held
        self._held, self._state = "", 0
        return text

    def _push_slowly(self, token_id: int, may_stop: bool) -> str:
        if self.stopped_by is not None:
            return ""
        text = self._stripped(self._decoder.decode(self._table.piece(token_id)))
        stops = self._stops
        if stops is None:
            self._is_plain = not self._strips and not self._decoder.getstate()[0]
            return text
        if not self._held and stops.first_chars.isdisjoint(text):
            return text
        return self._unheld(text, may_stop)

    def _stripped(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text

    def _unheld(self, text: str, may_stop: bool) -> str:
        """What can be sent of the held text and this one; the rest is held, or cut when a stop string is complete."""
        stops = self._stops
        if stops is None:
            return text
        if not may_stop:
            text, self._held, self._state = self._held + text, "", 0
            return text
        state, all_text = self._state, self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            state = stops.step(state, char)
            found = stops.found(state)
            if found is not None:
                self.stopped_by = found
                self._held = ""
                return all_text[: end - len(found)]
        self._state = state
        sent = len(all_text) - stops.depth[state]
        self._held = all_text[sent:]
        return all_text[:sent]


def _whole_text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _incomplete_end(table: DetokenizerTable, prompt_ids: Sequence[int]) -> bytes:
    """The bytes of a character that the prompt ends inside of (token ids can be cut anywhere), else b""."""
    end = b""
    for i in reversed(prompt_ids):
        if len(end) >= 3:
            break
        if i < len(table.texts) and table.texts[i]:
            break
        end = table.piece(i) + end
    decoder = _INCREMENTAL_UTF8("replace")
    decoder.decode(end)
    return decoder.getstate()[0]
