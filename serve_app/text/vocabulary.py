"""What every source of a tokenizer comes down to, and how the text of a token becomes bytes."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

SPACE_MARK: Final = "▁"  # sentencepiece writes a space so
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Control tokens that end a turn, by their names.
_TURN_ENDS: Final = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<|eot|>",
        "<EOT>",
    }
)

ByteRule = Callable[[Sequence[str]], list[bytes]]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's encoder and the facts around it.

    make_backend: builds the encoder, which takes far longer than all the rest; raises ModelFileError for a vocabulary
    that contradicts itself. texts: id → text in the vocabulary, None for ids without one. pieces: id → the bytes it
    contributes inside a text, b"" for control tokens. eos_id: the end of a text; eos_ids: it and the ends of a turn.
    prefix, suffix: ids that the model wants around a text. strips_space: encoding puts a space before a text, so
    decoding takes one away.
    """

    make_backend: Callable[[], Backend]
    texts: list[str | None]
    pieces: list[bytes]
    special_ids: frozenset[int]
    bos_id: int | None
    eos_id: int | None
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


@cache
def _byte_of_code() -> npt.NDArray[np.int16]:
    """byte_of_char by code point; -1 for those outside, the last one standing for all beyond."""
    table = np.full(0x145, -1, np.int16)
    for char, byte in byte_of_char().items():
        table[ord(char)] = byte
    return table


def byte_level_bytes(texts: Sequence[str]) -> list[bytes]:
    """The bytes of byte-level BPE tokens; a character outside that alphabet stands for itself. All in one go:
    a vocabulary has some 10^6 characters."""
    table = _byte_of_code()
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
    values = table[np.minimum(codes, len(table) - 1)]
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    raw = values.astype(np.uint8).tobytes()
    bounds = ends.tolist()
    pieces = [raw[begin:end] for begin, end in zip([0, *bounds], bounds, strict=False)]
    for i in np.unique(np.searchsorted(ends, np.flatnonzero(values < 0), side="right")).tolist():
        alphabet = byte_of_char()
        pieces[i] = b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in texts[i])
    return pieces


def sentencepiece_bytes(texts: Sequence[str]) -> list[bytes]:
    """The bytes of sentencepiece tokens: ▁ is a space, <0x0A> a byte."""
    return [_byte_token(text) or text.replace(SPACE_MARK, " ").encode() for text in texts]


def _byte_token(text: str) -> bytes | None:
    match = _BYTE_TOKEN.fullmatch(text) if text.startswith("<0x") else None
    return bytes.fromhex(match[1]) if match else None


def turn_ends(texts: Sequence[str | None], special_ids: Iterable[int]) -> list[int]:
    """The control tokens that end a turn by what they are called: configurations often name only one of them."""
    return sorted(i for i in special_ids if texts[i] in _TURN_ENDS)


def added_token(text: str, *, special: bool, rstrip: bool = False) -> AddedToken:
    """A token that is found in the text before anything else is done to it."""
    return AddedToken(text, special=special, normalized=False, rstrip=rstrip)


def token_pieces(
    texts: Sequence[str | None], byte_rule: ByteRule, special_ids: frozenset[int], verbatim_ids: frozenset[int]
) -> list[bytes]:
    """pieces for a Vocabulary; verbatim_ids are added tokens, whose text is no encoding of anything."""
    pieces = byte_rule([text or "" for text in texts])
    for i in verbatim_ids:
        text = texts[i] or ""
        pieces[i] = text.replace(SPACE_MARK, " ").encode() if byte_rule is sentencepiece_bytes else text.encode()
    for i in special_ids:
        pieces[i] = b""
    return pieces
