"""The tokenizer that a GGUF's metadata describes.

Keys and their defaults: ggml's docs/gguf.md, and llama.cpp's reading of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from operator import itemgetter
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models

from serve_app.errors import ModelFileError
from serve_app.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from serve_app.text.sentencepiece_vocab import Pieces, PieceType, build_backend, ids_of, special_ids
from serve_app.text.vocabulary import (
    Vocabulary,
    added_token,
    byte_level_bytes,
    sentencepiece_bytes,
    token_pieces,
    turn_ends,
)

_KEY: Final = "tokenizer.ggml."
_WHERE: Final = "the GGUF metadata"


def vocabulary_from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """ModelFileError names the key that is missing, of the wrong kind, or unknown."""
    fields = _Fields(metadata)
    model = fields.string("model")
    texts = fields.strings("tokens")
    if not texts:
        raise ModelFileError(f"{_WHERE} has an empty vocabulary ({_KEY}tokens)")
    types = fields.token_types(len(texts))
    if model == "llama":
        is_spm, adds_bos = True, True
        build = _sentencepiece
    elif model == "gpt2":
        is_spm, adds_bos = False, fields.pre_tokenizer().adds_bos
        build = _byte_level_bpe
    else:
        raise ModelFileError(f"{_WHERE} names the tokenizer model {model!r}; llama and gpt2 are supported")

    def make_backend() -> Backend:
        try:
            return build(fields, texts, types)
        except ModelFileError:
            raise
        except Exception as error:  # the library raises plain Exception for vocabularies that contradict themselves
            raise ModelFileError(f"{_WHERE} describes an impossible tokenizer ({error})") from None

    special = special_ids(types)
    user_defined = ids_of(types, PieceType.USER_DEFINED)
    bos_id = fields.token_id("bos_token_id", len(texts), 1 if is_spm else None)
    eos_ids = _eos_ids(fields, texts, special, 2 if is_spm else None)
    return Vocabulary(
        make_backend=make_backend,
        texts=list(texts),
        pieces=token_pieces(texts, sentencepiece_bytes if is_spm else byte_level_bytes, special, user_defined),
        special_ids=special,
        bos_id=bos_id,
        eos_id=fields.token_id("eos_token_id", len(texts), 2 if is_spm else None),
        eos_ids=eos_ids,
        prefix=(bos_id,) if bos_id is not None and fields.flag("add_bos_token", adds_bos) else (),
        suffix=eos_ids[:1] if fields.flag("add_eos_token", False) else (),
        strips_space=is_spm and fields.flag("add_space_prefix", True),
    )


def _sentencepiece(fields: "_Fields", texts: Sequence[str], types: Sequence[int]) -> Backend:
    unk_id = fields.token_id("unknown_token_id", len(texts), 0)
    assert unk_id is not None
    rstrip: frozenset[int] = frozenset()
    if fields.architecture == "phi3":
        # Phi-3's chat tokens swallow the white space behind them; GGUF has no key that says so.
        kept = {"<unk>", "<s>", "<|endoftext|>"}
        rstrip = frozenset(i for i in special_ids(types) if texts[i] not in kept)
    return build_backend(
        Pieces(
            texts=texts,
            scores=fields.scores(len(texts)),
            types=types,
            unk_id=unk_id,
            space_prefix="always" if fields.flag("add_space_prefix", True) else "never",
            rstrip_ids=rstrip,
        )
    )


def _byte_level_bpe(fields: "_Fields", texts: Sequence[str], types: Sequence[int]) -> Backend:
    pre = fields.pre_tokenizer()
    merges = _merges(fields.strings("merges"))
    vocab = dict(zip(texts, range(len(texts)), strict=True))
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignores_merges))
    backend.pre_tokenizer = pre.build()
    if pre.normalizer is not None:
        backend.normalizer = pre.normalizer()
    backend.add_special_tokens([added_token(texts[i], special=True) for i in sorted(special_ids(types))])
    user_defined = sorted(ids_of(types, PieceType.USER_DEFINED))
    backend.add_tokens([added_token(texts[i], special=False) for i in user_defined])
    return backend


def _merges(texts: list[str]) -> list[tuple[str, str]]:
    """The pairs of all merges; almost always each is two words, which is far the quickest to find out for all."""
    pairs: list[Any] = list(map(tuple, map(str.split, texts, repeat(" "))))
    if all(map(itemgetter(0), pairs)) and set(map(len, pairs)) <= {2}:
        return pairs
    return [_merge(text) for text in texts]


def _merge(text: str) -> tuple[str, str]:
    """ "left right"; the first character may itself be a space."""
    cut = text.find(" ", 1)
    if cut < 0:
        raise ModelFileError(f"{_WHERE} has a merge without two parts ({_KEY}merges: {text[:40]!r})")
    return text[:cut], text[cut + 1 :]


def _eos_ids(fields: "_Fields", texts: Sequence[str], special: Iterable[int], default: int | None) -> tuple[int, ...]:
    """The end of the text first, then the ends of a turn."""
    stated = [
        fields.token_id("eos_token_id", len(texts), default),
        fields.token_id("eot_token_id", len(texts)),
        fields.token_id("eom_token_id", len(texts)),
    ]
    return tuple(dict.fromkeys(i for i in [*stated, *turn_ends(texts, special)] if i is not None))


class _Fields:
    """Typed access to tokenizer.ggml.*."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.architecture = metadata.get("general.architecture")

    def string(self, key: str) -> str:
        value = self._metadata.get(_KEY + key)
        if not isinstance(value, str):
            raise self._bad(key, "is missing or no string")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._metadata.get(_KEY + key)
        if not isinstance(value, list):
            raise self._bad(key, "is missing or no list of strings")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(_KEY + key, default)
        if not isinstance(value, bool):
            raise self._bad(key, "is no boolean")
        return value

    def token_id(self, key: str, vocab_size: int, default: int | None = None) -> int | None:
        """None where the key is absent, or is the file's "no such token" (all bits set)."""
        value = self._metadata.get(_KEY + key, default)
        if value is None or value in (-1, 0xFFFFFFFF):
            return None
        if type(value) is not int or not 0 <= value < vocab_size:
            raise self._bad(key, f"is no token id below {vocab_size}")
        return value

    def token_types(self, vocab_size: int) -> list[int]:
        return list(map(int, self._numbers("token_type", vocab_size, PieceType.NORMAL)))

    def scores(self, vocab_size: int) -> list[float]:
        return self._numbers("scores", vocab_size, 0.0)

    def pre_tokenizer(self) -> PreTokenizer:
        name = self._metadata.get(_KEY + "pre", "default")
        kind = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise self._bad("pre", f"is {name!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}")
        return kind

    def _numbers(self, key: str, count: int, default: float) -> list[float]:
        values = self._metadata.get(_KEY + key)
        if values is None:
            return [float(default)] * count
        if isinstance(values, str | int | float) or len(values) != count:
            raise self._bad(key, f"does not have one number for each of the {count} tokens")
        try:
            return list(map(float, values.tolist() if isinstance(values, np.ndarray) else values))
        except (TypeError, ValueError):
            raise self._bad(key, "does not hold numbers") from None

    def _bad(self, key: str, sentence: str) -> ModelFileError:
        return ModelFileError(f"{_WHERE}: key {_KEY}{key} {sentence}")
