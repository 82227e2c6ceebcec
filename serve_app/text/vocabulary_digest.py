"""Whether two tokenizers mean the same by their ids."""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

from serve_app.text.tokenizer import Tokenizer


def vocabulary_of(tokenizer: Tokenizer) -> list[bytes]:
    """By id, what tells a token from others: its bytes, or a control token's name. b"" for ids without a token, with
    which no list ends."""
    special = tokenizer.special_ids
    tokens = [
        b"control:" + tokenizer.token_text(i).encode() if i in special else tokenizer.token_bytes(i)
        for i in range(tokenizer.vocab_size)
    ]
    while tokens and not tokens[-1]:
        tokens.pop()
    return tokens


def vocabulary_digest(tokens: Sequence[bytes]) -> bytes:
    """16 bytes that are the same for the same list."""
    digest = hashlib.blake2b(digest_size=16)
    for token in tokens:
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.digest()


def first_difference(mine: Sequence[bytes], others: Sequence[bytes]) -> int | None:
    """The first id that stands for something else, or for nothing, in one of two lists."""
    pairs = enumerate(zip_longest(mine, others))
    return next((i for i, (a, b) in pairs if a != b), None)


def refusal(target: Sequence[bytes], draft: Sequence[bytes]) -> str:
    """A sentence about two vocabularies that differ."""
    number = first_difference(target, draft)
    assert number is not None
    mine, others = (repr(tokens[number].decode(errors="replace")) if number < len(tokens) else "no token"
                    for tokens in (target, draft))  # fmt: skip
    return (
        f"The draft model has another tokenizer: id {number} is {mine} to the target and {others} to the draft. "
        "--draft-vocab text lets it propose by way of the text."
    )
