"""Text to token ids and back. Every kind of source ends in one `tokenizers.Tokenizer`, which does the encoding."""

import threading
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from serve_app.errors import InvalidRequest, ModelFileError
from serve_app.gguf_file import open_gguf
from serve_app.text.gguf_vocab import vocabulary_from_gguf
from serve_app.text.tokenizer_files import (
    vocabulary_from_folder,
    vocabulary_from_json,
    vocabulary_from_sentencepiece,
)
from serve_app.text.vocabulary import Vocabulary, byte_of_char


class Tokenizer:
    """Encodes and decodes. Safe to share between threads.

    eos_id ends a text; eos_ids are it and the ends of a turn, as the tokenizer's own files have them; a model's
    generation_config may add more. special_ids are control tokens: they contribute no text, and only parse_special
    finds them in one.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._text_of_char = {byte: char for char, byte in byte_of_char().items()}
        self.vocab_size = len(vocabulary.texts)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eos_ids = vocabulary.eos_ids
        self.special_ids = vocabulary.special_ids
        self.add_bos = bool(vocabulary.prefix)
        self.add_eos = bool(vocabulary.suffix)
        self.strips_space = vocabulary.strips_space

    @cached_property
    def _backend(self) -> Backend:
        return self._vocabulary.make_backend()

    def build_encoder(self) -> None:
        """Builds what encodes, unless it is there. Raises ModelFileError for a vocabulary that contradicts itself."""
        _ = self._backend

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        add_special puts the model's BOS (EOS) around it where the model wants them, and never a second one.
        parse_special reads control tokens written out in the text, as a chat template writes them; without it they
        are plain characters, whoever typed them. Raises InvalidRequest for a text that is no Unicode.
        """
        try:
            with self._lock:
                self._backend.encode_special_tokens = not parse_special
                ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InvalidRequest("The text holds a lone surrogate, which is no Unicode character.") from None
        if not parse_special and not self.special_ids.isdisjoint(ids):
            ids = self._as_characters(ids)
        if add_special:
            prefix, suffix = self._vocabulary.prefix, self._vocabulary.suffix
            if prefix and (not parse_special or ids[:1] != [prefix[0]]):
                ids = [*prefix, *ids]
            if suffix and (not parse_special or ids[-1:] != [suffix[-1]]):
                ids = [*ids, *suffix]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of some ids from its beginning; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        pieces, texts, special = self._vocabulary.pieces, self._vocabulary.texts, self.special_ids
        parts = []
        for i in ids:
            if 0 <= i < self.vocab_size:
                parts.append(pieces[i] if skip_special or i not in special else (texts[i] or "").encode())
        text = b"".join(parts).decode(errors="replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """What the token contributes inside a text; b"" for control tokens and for ids without a token."""
        return self._vocabulary.pieces[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """The token for people to read: control tokens by their name, a part of a character as bytes:\\xf0\\x9f."""
        if token_id in self.special_ids:
            return self._vocabulary.texts[token_id] or ""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_to_id(self, text: str) -> int | None:
        """The id of a token by its text in the vocabulary (control tokens: "<|eot_id|>"), or None."""
        found: int | None = self._backend.token_to_id(text)
        return found

    def id_of_text(self, text: str) -> int | None:
        """As token_to_id, without an encoder; slow."""
        texts = self._vocabulary.texts
        return texts.index(text) if text in texts else None

    def _as_characters(self, ids: list[int]) -> list[int]:
        """Replaces control tokens that plain text merged into by the tokens of their characters."""
        result: list[int] = []
        for i in ids:
            if i in self.special_ids:
                for char in self._vocabulary.texts[i] or "":
                    result += self._character_ids(char)
            else:
                result.append(i)
        return result

    def _character_ids(self, char: str) -> list[int]:
        tokens = self._backend.model.tokenize(char)
        if not tokens or tokens[0].id in self.special_ids:  # a byte-level model knows only its own alphabet
            tokens = [t for b in char.encode() for t in self._backend.model.tokenize(self._text_of_char[b])]
        return [t.id for t in tokens if t.id not in self.special_ids]


def open_tokenizer(source: Path | Mapping[str, Any], *, encodes: bool = True) -> Tokenizer:
    """The tokenizer of a folder (tokenizer.json, else tokenizer.model), of such a file, or of GGUF metadata.

    tokenizer_config.json is read from the same folder. encodes: whether the encoder is built at once, or when it is
    first used; most processes of an engine only decode. Raises ModelFileError with one sentence.
    """
    tokenizer = Tokenizer(_vocabulary(source))
    if encodes:
        tokenizer.build_encoder()
    return tokenizer


def _vocabulary(source: Path | Mapping[str, Any]) -> Vocabulary:
    if isinstance(source, Mapping):
        return vocabulary_from_gguf(source)
    if source.is_dir():
        return vocabulary_from_folder(source)
    if source.suffix == ".json":
        return vocabulary_from_json(source)
    if source.suffix == ".gguf":
        with open_gguf(source) as file:
            return vocabulary_from_gguf(file.metadata)
    if source.exists():
        return vocabulary_from_sentencepiece(source)
    raise ModelFileError(f"{source}: no such tokenizer file or folder")
