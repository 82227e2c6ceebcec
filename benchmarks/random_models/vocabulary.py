"""A byte-level BPE vocabulary of any size: of our own making, or taken from a GGUF file."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from serve_app.gguf_file import open_gguf
from serve_app.text.vocabulary import byte_of_char

_SPACE = next(char for char, byte in byte_of_char().items() if byte == ord(" "))
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
_NUM_CONTROL = 256
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True, slots=True)
class BpeVocabulary:
    """Tokens with GGUF's types, merges "left right" best first, the name of the way to cut words, and two ids."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    bos_id: int
    eos_id: int

    def metadata(self) -> dict[str, Any]:
        """As a GGUF file states it."""
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.merges": self.merges,
            "tokenizer.ggml.bos_token_id": self.bos_id,
            "tokenizer.ggml.eos_token_id": self.eos_id,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_template": CHAT_TEMPLATE,
        }


def make_vocabulary(size: int) -> BpeVocabulary:
    """The bytes, then all words over a to z by length, with and without a space before them, then control tokens.

    A space and one letter is always one token: a prompt of n such words has n tokens.
    """
    texts = sorted(byte_of_char(), key=byte_of_char().__getitem__)
    num_words = size - len(texts) - _NUM_CONTROL
    assert num_words > 0, f"a vocabulary of {size} has no place for words"
    merges = list(islice(_words(), num_words))
    texts += [left + right for left, right in merges]
    first_control = len(texts)
    controls = ["<|begin_of_text|>", "<|end_of_text|>"]
    controls += [f"<|reserved_{i}|>" for i in range(_NUM_CONTROL - len(controls))]
    return BpeVocabulary(
        texts + controls,
        [_NORMAL] * first_control + [_CONTROL] * _NUM_CONTROL,
        [f"{left} {right}" for left, right in merges],
        "llama-bpe",
        first_control,
        first_control + 1,
    )


def vocabulary_from_gguf(path: Path, size: int) -> BpeVocabulary:
    """The byte-level BPE vocabulary of a GGUF, filled up to the size with tokens that no text has."""
    with open_gguf(path) as file:
        metadata = file.metadata
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        raise SystemExit(f"{path}: holds no byte-level BPE vocabulary (tokenizer.ggml.model is not gpt2)")
    tokens = list(metadata["tokenizer.ggml.tokens"])
    if len(tokens) > size:
        raise SystemExit(f"{path}: has {len(tokens)} tokens, the model only {size}")
    missing = size - len(tokens)
    types = [int(t) for t in metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))]
    return BpeVocabulary(
        tokens + [f"[unused {i}]" for i in range(missing)],
        types + [_UNUSED] * missing,
        list(metadata["tokenizer.ggml.merges"]),
        metadata.get("tokenizer.ggml.pre", "gpt-2"),
        metadata["tokenizer.ggml.bos_token_id"],
        metadata["tokenizer.ggml.eos_token_id"],
    )


def _words() -> Iterator[tuple[str, str]]:
    """(a shorter word, its next letter), breadth first."""
    shorter = [_SPACE, *ascii_lowercase]
    for left in shorter:
        for letter in ascii_lowercase:
            yield left, letter
            shorter.append(left + letter)
