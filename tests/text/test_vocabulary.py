from hypothesis import given
from hypothesis import strategies as st

from serve_app.text.vocabulary import (
    byte_level_bytes,
    byte_of_char,
    sentencepiece_bytes,
    token_pieces,
)

LAST_BYTE = bytes([byte_of_char()["\u0143"]])
ALPHABET = {byte: char for char, byte in byte_of_char().items()}


@given(st.lists(st.binary(max_size=9), max_size=20))
def test_byte_level_tokens_give_their_bytes_back(pieces: list[bytes]) -> None:
    assert byte_level_bytes(["".join(ALPHABET[b] for b in piece) for piece in pieces]) == pieces


def test_characters_outside_of_the_alphabet_stand_for_themselves() -> None:
    texts = ["Ġa", "two words", "Ċ", "", "中Ġ", "\u0143\u0145", "😀"]
    assert byte_level_bytes(texts) == [
        b" a", b"two words", b"\n", b"", "中 ".encode(), LAST_BYTE + "\u0145".encode(), "😀".encode(),
    ]  # fmt: skip


def test_sentencepiece_tokens() -> None:
    assert sentencepiece_bytes(["▁a", "<0x00>", "<0xE9>", "<0xE9", "<b>"]) == [b" a", b"\0", b"\xe9", b"<0xE9", b"<b>"]


def test_special_tokens_are_no_text_and_verbatim_ones_are_what_they_are() -> None:
    texts = ["Ġa", "<s>", None, "Ġ b", "Ġ"]
    assert token_pieces(texts, byte_level_bytes, frozenset({1, 4}), frozenset({3, 4})) == [
        b" a", b"", b"", "Ġ b".encode(), b"",
    ]  # fmt: skip
    assert token_pieces(["▁x", "▁y"], sentencepiece_bytes, frozenset(), frozenset({1})) == [b" x", b" y"]
