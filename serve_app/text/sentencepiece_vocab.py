"""Sentencepiece vocabularies (pieces, scores, types) as a `tokenizers` BPE or Unigram model."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from serve_app.text.vocabulary import SPACE_MARK, added_token


class PieceType(IntEnum):
    """Kinds of a piece, numbered as in sentencepiece_model.proto; GGUF's token_type has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SpacePrefix = Literal["never", "first", "always"]


@dataclass(frozen=True, slots=True)
class Pieces:
    """A sentencepiece vocabulary. texts, scores and types have one entry per id.

    space_prefix: a space is put before the text, or before every stretch between added tokens ("always"), as the
    older transformers tokenizers and llama.cpp do. charsmap: precompiled normalisation rules, b"" for none.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unk_id: int
    space_prefix: SpacePrefix = "always"
    is_unigram: bool = False
    charsmap: bytes = b""
    removes_extra_spaces: bool = False
    rstrip_ids: frozenset[int] = frozenset()


def ids_of(types: Sequence[int], *kinds: PieceType) -> frozenset[int]:
    """Ids of the tokens of these kinds."""
    wanted = frozenset(map(int, kinds))  # plain integers compare ten times faster
    return frozenset(i for i, kind in enumerate(types) if kind in wanted)


def special_ids(types: Sequence[int]) -> frozenset[int]:
    """Ids that are no text: control tokens and the unknown token."""
    return ids_of(types, PieceType.CONTROL, PieceType.UNKNOWN)


def build_backend(pieces: Pieces) -> Backend:
    """The encoder of a sentencepiece vocabulary. ValueError or the library's own Exception for an impossible one."""
    has_bytes = PieceType.BYTE in pieces.types
    if pieces.is_unigram:
        scored = list(zip(pieces.texts, map(float, pieces.scores), strict=True))
        backend = Backend(models.Unigram(scored, unk_id=pieces.unk_id, byte_fallback=has_bytes))
    else:
        vocab = {text: i for i, text in enumerate(pieces.texts)}
        backend = Backend(
            models.BPE(
                vocab=vocab,
                merges=_merges(pieces),
                unk_token=pieces.texts[pieces.unk_id],
                fuse_unk=True,
                byte_fallback=has_bytes,
            )
        )
    backend.normalizer = _normalizer(pieces)
    if pieces.space_prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE_MARK, prepend_scheme="first", split=False)
    control = special_ids(pieces.types)
    backend.add_special_tokens(
        [added_token(pieces.texts[i], special=True, rstrip=i in pieces.rstrip_ids) for i in sorted(control)]
    )
    backend.add_tokens(
        [
            added_token(pieces.texts[i].replace(SPACE_MARK, " "), special=False, rstrip=i in pieces.rstrip_ids)
            for i in sorted(ids_of(pieces.types, PieceType.USER_DEFINED))
        ]
    )
    return backend


def _normalizer(pieces: Pieces) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.removes_extra_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if pieces.space_prefix == "always":
        steps.append(normalizers.Prepend(SPACE_MARK))
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    return normalizers.Sequence(steps)


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Every way to make a normal piece out of two, best score first.

    Sentencepiece merges the adjacent pair whose result scores best. Only normal pieces take part: a text must not
    merge into a control, byte or unused token that happens to be spelled like it.
    """
    rank: dict[str, float] = {}
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.types, strict=True):
        if kind == PieceType.NORMAL:
            rank[text] = float(score)
    found: list[tuple[float, int, int, str, str]] = []
    for order, (text, score) in enumerate(rank.items()):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in rank and right in rank:
                found.append((-score, order, cut, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
