"""Reads a sentencepiece .model: the few fields of sentencepiece_model.proto that encoding needs.

The protobuf wire format is a list of (field number, value) pairs, so no protobuf package is needed.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from serve_app.errors import ModelFileError
from serve_app.text.sentencepiece_vocab import Pieces, PieceType, SpacePrefix

_MAX_BYTES: Final = 256 << 20
_UNIGRAM, _BPE = 1, 2


def read_sentencepiece(path: Path, space_prefix: SpacePrefix = "always") -> Pieces:
    """The vocabulary of a .model file; space_prefix applies where the model asks for a prefix at all.

    Raises ModelFileError for a file of another kind, a truncated one, and model types other than BPE and unigram.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ModelFileError(f"{path}: is too large for a tokenizer")
        raw = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return _parse(raw, space_prefix)
    except (ValueError, struct.error) as error:
        raise ModelFileError(f"{path}: is no sentencepiece model ({error})") from None


def _parse(raw: bytes, space_prefix: SpacePrefix) -> Pieces:
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(raw):
        if number == 1:
            piece = dict(_fields(_message(value)))
            texts.append(_message(piece.get(1, b"")).decode())
            (score,) = struct.unpack("<f", _message(piece.get(2, bytes(4))))
            scores.append(score)
            types.append(int(piece.get(3, PieceType.NORMAL)))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    if PieceType.UNKNOWN not in types or len(set(texts)) != len(texts):
        raise ValueError("its pieces are not distinct, or none is the unknown piece")
    kind = int(trainer.get(3, _UNIGRAM))
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError(f"model type {kind} is neither BPE nor unigram")
    return Pieces(
        texts=texts,
        scores=scores,
        types=types,
        unk_id=types.index(PieceType.UNKNOWN),
        space_prefix=space_prefix if normalizer.get(3, 1) else "never",
        is_unigram=kind == _UNIGRAM,
        charsmap=_message(normalizer.get(2, b"")),
        removes_extra_spaces=bool(normalizer.get(4, 1)),
    )


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field has the wrong kind")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs of a message: varints as int, all else as bytes. ValueError where it is malformed."""
    pos = 0
    while pos < len(data):
        tag, pos = _varint(data, pos)
        wire = tag & 7
        if wire == 0:
            number, pos = _varint(data, pos)
            yield tag >> 3, number
            continue
        if wire == 2:
            size, pos = _varint(data, pos)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if size > len(data) - pos:
            raise ValueError("it is truncated")
        yield tag >> 3, data[pos : pos + size]
        pos += size


def _varint(data: bytes, pos: int) -> tuple[int, int]:
    value = shift = 0
    while pos < len(data) and shift < 70:
        byte = data[pos]
        value |= (byte & 0x7F) << shift
        pos += 1
        if byte < 0x80:
            return value, pos
        shift += 7
    raise ValueError("it is truncated")
