"""What every source of a tokenizer comes down to, and how the text of a token becomes bytes."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

SPACE_MARK: Final = "▁"  # sentencepiece writes a space so
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")

ByteRule = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's encoder and the facts around it.

    texts: id → text in the vocabulary, None for ids without one. pieces: id → the bytes it contributes inside a text,
    b"" for control tokens. prefix, suffix: ids that the model wants around a text. strips_space: encoding puts a
    space before a text, so decoding takes one away.
    """

    backend: Backend
    texts: list[str | None]
    pieces: list[bytes]
    special_ids: frozenset[int]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    strips_space: bool


@cache
def byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet for byte-level BPE: printable Latin-1 stands for itself, the other bytes for U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in printable)
    return table | {chr(0x100 + i): b for i, b in enumerate(others)}


def byte_level_bytes(text: str) -> bytes:
    """The bytes of a byte-level BPE token; a character outside that alphabet stands for itself."""
    table = byte_of_char()
    try:
        return bytes([table[c] for c in text])
    except KeyError:
        return b"".join(bytes([table[c]]) if c in table else c.encode() for c in text)


def sentencepiece_bytes(text: str) -> bytes:
    """The bytes of a sentencepiece token: ▁ is a space, <0x0A> a byte."""
    match = _BYTE_TOKEN.fullmatch(text)
    if match:
        return bytes.fromhex(match[1])
    return text.replace(SPACE_MARK, " ").encode()


def added_token(text: str, *, special: bool, rstrip: bool = False) -> AddedToken:
    """A token that is found in the text before anything else is done to it."""
    return AddedToken(text, special=special, normalized=False, rstrip=rstrip)


def token_pieces(
    texts: Iterable[str | None], byte_rule: ByteRule, special_ids: frozenset[int], verbatim_ids: frozenset[int]
) -> list[bytes]:
    """pieces for a Vocabulary; verbatim_ids are added tokens, whose text is no encoding of anything."""
    pieces = []
    for i, text in enumerate(texts):
        if text is None or i in special_ids:
            pieces.append(b"")
        elif i in verbatim_ids:
            pieces.append(text.replace(SPACE_MARK, " ").encode() if byte_rule is sentencepiece_bytes else text.encode())
        else:
            pieces.append(byte_rule(text))
    return pieces
