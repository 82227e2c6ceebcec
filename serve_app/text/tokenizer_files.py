"""The tokenizer of a checkpoint folder: tokenizer.json, else a sentencepiece model, with tokenizer_config.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from serve_app.errors import ModelFileError
from serve_app.text.sentencepiece_file import read_sentencepiece
from serve_app.text.sentencepiece_vocab import PieceType, build_backend, ids_of, special_ids
from serve_app.text.vocabulary import (
    ByteRule,
    Vocabulary,
    added_token,
    byte_level_bytes,
    sentencepiece_bytes,
    token_pieces,
    turn_ends,
)

_ROLES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
_MAX_JSON_BYTES: Final = 512 << 20


def read_json(path: Path) -> Any:
    """The value of a JSON file; ModelFileError where it cannot be read or is no JSON."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFileError(f"{path}: is too large")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: is no JSON ({error})") from None


def token_text_of(value: Any) -> str | None:
    """A token in a config: its text, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def vocabulary_from_folder(folder: Path) -> Vocabulary:
    """tokenizer.json is taken where there is one. ModelFileError where the folder has no tokenizer."""
    if (folder / "tokenizer.json").exists():
        return vocabulary_from_json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").exists():
        return vocabulary_from_sentencepiece(folder / "tokenizer.model")
    raise ModelFileError(f"{folder}: has neither tokenizer.json nor tokenizer.model; name one with --tokenizer")


def vocabulary_from_json(path: Path) -> Vocabulary:
    """A tokenizer.json, with what the configs beside it say about its special tokens."""
    content = read_json(path)
    config = _Config(path.parent)
    if not isinstance(content, dict):
        raise ModelFileError(f"{path}: is no tokenizer")
    try:
        backend = Backend.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
    except Exception as error:  # the library raises plain Exception
        raise ModelFileError(f"{path}: is no tokenizer that can be used ({error})") from None
    config.declare_special(backend)
    decoders = list(_flattened(content.get("decoder"), "decoders"))
    is_byte_level = any(d.get("type") == "ByteLevel" for d in decoders)
    return _with_config(
        backend,
        config,
        path,
        byte_level_bytes if is_byte_level else sentencepiece_bytes,
        any(_strips_space(d) for d in decoders),
        _around(backend),
    )


def vocabulary_from_sentencepiece(path: Path) -> Vocabulary:
    """A sentencepiece .model; tokens that tokenizer_config.json adds come behind its own."""
    config = _Config(path.parent)
    pieces = read_sentencepiece(path, "always" if config.values.get("legacy", True) else "first")
    try:
        backend = build_backend(pieces)
        config.add_tokens(backend, path)
    except ModelFileError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ModelFileError(f"{path}: is no tokenizer that can be used ({error})") from None
    config.declare_special(backend)
    bos = config.token_id(backend, "bos_token", "<s>")
    return _with_config(
        backend,
        config,
        path,
        sentencepiece_bytes,
        pieces.space_prefix != "never",
        ((bos,) if bos is not None else (), ()),
        special_ids(pieces.types),
        ids_of(pieces.types, PieceType.USER_DEFINED),
        "<s>",
        "</s>",
    )


def _with_config(
    backend: Backend,
    config: "_Config",
    path: Path,
    byte_rule: ByteRule,
    strips_space: bool,
    around: tuple[tuple[int, ...], tuple[int, ...]],
    special: frozenset[int] = frozenset(),
    verbatim: frozenset[int] = frozenset(),
    default_bos: str | None = None,
    default_eos: str | None = None,
) -> Vocabulary:
    """Puts the parts together; around is what the encoder itself puts around a text, which the config can change."""
    texts = _texts(backend, path)
    for i, token in backend.get_added_tokens_decoder().items():
        if token.special:
            special |= {i}
        else:
            verbatim |= {i}
    prefix, suffix = around
    bos_id = config.token_id(backend, "bos_token", default_bos)
    eos_id = config.token_id(backend, "eos_token", default_eos)
    adds_bos, adds_eos = config.values.get("add_bos_token"), config.values.get("add_eos_token")
    if isinstance(adds_bos, bool) and bos_id is not None:
        prefix = (prefix or (bos_id,)) if adds_bos else ()
    if isinstance(adds_eos, bool) and eos_id is not None:
        suffix = (suffix or (eos_id,)) if adds_eos else ()
    return Vocabulary(
        make_backend=lambda: backend,
        texts=texts,
        pieces=token_pieces(texts, byte_rule, special, verbatim),
        special_ids=special,
        bos_id=bos_id if bos_id is not None else next(iter(prefix), None),
        eos_id=eos_id,
        eos_ids=tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *turn_ends(texts, special)])),
        prefix=prefix,
        suffix=suffix,
        strips_space=strips_space,
    )


def _texts(backend: Backend, path: Path) -> list[str | None]:
    vocab = backend.get_vocab(with_added_tokens=True)
    if not vocab:
        raise ModelFileError(f"{path}: has an empty vocabulary")
    last = max(vocab.values())
    if last > 16 * len(vocab) + 65536:
        raise ModelFileError(f"{path}: has the absurd token id {last}")
    texts: list[str | None] = [None] * (last + 1)
    for text, i in vocab.items():
        texts[i] = text
    return texts


def _around(backend: Backend) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor of a tokenizer.json puts before and behind a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _flattened(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """A decoder of a tokenizer.json, or the members of a sequence of them."""
    if isinstance(part, dict):
        if part.get("type") == "Sequence":
            for member in part.get(inner) or ():
                yield from _flattened(member, inner)
        else:
            yield part


def _strips_space(decoder: dict[str, Any]) -> bool:
    if decoder.get("type") == "Strip":
        return decoder.get("content") == " " and bool(decoder.get("start"))
    if decoder.get("type") == "Metaspace":
        default = "always" if decoder.get("add_prefix_space", True) else "never"
        return bool(decoder.get("prepend_scheme", default) != "never")
    return False


class _Config:
    """tokenizer_config.json, and special_tokens_map.json for what it leaves out."""

    def __init__(self, folder: Path) -> None:
        self.values: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            path = folder / name
            if path.exists():
                values = read_json(path)
                if not isinstance(values, dict):
                    raise ModelFileError(f"{path}: is no JSON object")
                self.values |= {k: v for k, v in values.items() if v is not None}

    def token_id(self, backend: Backend, role: str, default: str | None = None) -> int | None:
        text = token_text_of(self.values.get(role, default))
        return None if text is None else backend.token_to_id(text)

    def declare_special(self, backend: Backend) -> None:
        """The tokens with a role are control tokens, even where the tokenizer itself does not mark them."""
        known = {t.content: t for t in backend.get_added_tokens_decoder().values()}
        for text in filter(None, (token_text_of(self.values.get(role)) for role in _ROLES)):
            token = known.get(text)
            if backend.token_to_id(text) is not None and (token is None or not token.special):
                rstrip = token.rstrip if token else False
                backend.add_special_tokens([added_token(text, special=True, rstrip=rstrip)])

    def add_tokens(self, backend: Backend, path: Path) -> None:
        """Adds added_tokens_decoder; the ids must come out as stated there."""
        stated = self.values.get("added_tokens_decoder", {})
        if not isinstance(stated, dict):
            raise ModelFileError(f"{path}: added_tokens_decoder in tokenizer_config.json is no object")
        for key, value in sorted(stated.items(), key=lambda item: (len(item[0]), item[0])):
            text = token_text_of(value)
            if text is None:
                raise ModelFileError(f"{path}: added token {key!r} in tokenizer_config.json has no text")
            flags = {f: bool(value.get(f)) for f in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            token = AddedToken(text, **flags)
            if flags["special"]:
                backend.add_special_tokens([token])
            else:
                backend.add_tokens([token])
            if str(backend.token_to_id(text)) != key:
                raise ModelFileError(f"{path}: added token {text!r} cannot have the id {key} of tokenizer_config.json")
