"""A GGUF's tokenizer out of a folder's tokenizer.json or tokenizer.model, and what stands beside it.

Keys and types of tokens are those that llama.cpp's converter writes. BOS, EOS and whether they are put around a text
come from our own reading of the folder, so that both files encode alike.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from serve_app.errors import LaunchError
from serve_app.text.pre_tokenizers import pre_tokenizer_name
from serve_app.text.sentencepiece_file import read_sentencepiece
from serve_app.text.sentencepiece_vocab import PieceType
from serve_app.text.tokenizer_files import read_json, token_text_of, vocabulary_from_folder
from serve_app.text.vocabulary import SPACE_MARK

logger = logging.getLogger(__name__)

_KEY = "tokenizer.ggml."
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0


def tokenizer_values(
    folder: Path, config: Mapping[str, Any], vocab_size: int, pre_tokenizer: str | None
) -> dict[str, Any]:
    """Key → value. LaunchError, with the reason, for a tokenizer that a GGUF cannot describe.

    config: of config.json. vocab_size: rows of the embedding. llama.cpp wants as many tokens; those without a row are
    left out. pre_tokenizer: see pre_tokenizer_name.
    """
    settings = _settings(folder)
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        kind = content.get("model", {}).get("type")
        if kind != "BPE":
            raise LaunchError(f"{folder}: a tokenizer of kind {kind} cannot be written as .gguf.")
        is_spm = bool(content["model"].get("byte_fallback"))
        table = _Table(vocab_size, content["model"]["vocab"])
        table.add({token["id"]: token for token in content.get("added_tokens") or []}, is_spm)
        values = _spm(folder, content, table) if is_spm else _bpe(folder, content, pre_tokenizer)
    elif (folder / "tokenizer.model").is_file():
        is_spm = True
        pieces = read_sentencepiece(folder / "tokenizer.model")
        if pieces.is_unigram:
            raise LaunchError(f"{folder}: a tokenizer of sentencepiece's kind unigram cannot be written as .gguf.")
        table = _Table(vocab_size, {text: i for i, text in enumerate(pieces.texts)})
        table.types[: len(pieces.types)] = list(pieces.types)
        table.scores[: len(pieces.scores)] = list(pieces.scores)
        table.add({int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}, is_spm)
        values = {"unknown_token_id": pieces.unk_id, "add_space_prefix": pieces.space_prefix != "never"}
    else:
        raise LaunchError(f"{folder}: has neither tokenizer.json nor tokenizer.model, which a .gguf needs.")
    if len(table.texts) > vocab_size:
        logger.warning("%s: tokens without a row of the embedding are left out, from %d on", folder, vocab_size)
    table.cut(vocab_size)
    values |= {"tokens": table.texts, "token_type": table.types}
    if is_spm:
        values |= {"model": "llama", "pre": "default", "scores": table.scores}
    values |= _special(folder, config, settings, vocab_size)
    return {_KEY + key: value for key, value in values.items()}


class _Table:
    """Text, type and score of each id; those without a token are padding."""

    def __init__(self, vocab_size: int, vocab: Mapping[str, int]) -> None:
        count = max(vocab_size, 1 + max(vocab.values(), default=0))
        self.texts = [f"[PAD{i}]" for i in range(count)]
        self.types = [int(PieceType.UNUSED)] * count
        self.scores = [_PADDING_SCORE] * count
        for text, i in vocab.items():
            self.texts[i], self.types[i] = text, int(PieceType.NORMAL)

    def cut(self, count: int) -> None:
        """Leaves the first ones."""
        del self.texts[count:], self.types[count:], self.scores[count:]

    def add(self, added: Mapping[int, Any], is_spm: bool) -> None:
        """Added tokens: control tokens where they are special or look so, else ones that are found in any text."""
        for i, token in added.items():
            text = token_text_of(token)
            if text is None or not 0 <= i < len(self.texts) + len(added):
                continue
            while i >= len(self.texts):
                self.texts.append(f"[PAD{len(self.texts)}]")
                self.types.append(int(PieceType.UNUSED))
                self.scores.append(_PADDING_SCORE)
            is_control = bool(token.get("special")) or _looks_special(text)
            if self.types[i] != PieceType.UNKNOWN:
                self.types[i] = int(PieceType.CONTROL if is_control else PieceType.USER_DEFINED)
            self.texts[i] = text if is_control or not is_spm else text.replace(SPACE_MARK, " ")
            self.scores[i] = _ADDED_SCORE


def _looks_special(text: str) -> bool:
    """Some models' control tokens are not marked as such (Gemma's, DeepSeek's). Rule: llama.cpp's converter."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    named = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return text in named or any(text.startswith(left) and text.endswith(right) for left, right in brackets)


def _spm(folder: Path, content: Mapping[str, Any], table: _Table) -> dict[str, Any]:
    """Sentencepiece's BPE, which has scores in place of merges."""
    model = content["model"]
    scores = _true_scores(folder, table) or _scores_of_merges(model["merges"])
    for i, text in enumerate(table.texts):
        if table.types[i] != PieceType.NORMAL:
            continue
        if len(text) == 6 and text.startswith("<0x"):
            table.types[i], table.scores[i] = int(PieceType.BYTE), 0.0
        else:
            table.scores[i] = scores.get(text, -float(len(scores)))
    values: dict[str, Any] = {"add_space_prefix": _adds_space(content)}
    if model.get("unk_token") in model["vocab"]:
        unknown = model["vocab"][model["unk_token"]]
        table.types[unknown] = int(PieceType.UNKNOWN)
        values["unknown_token_id"] = unknown
    return values


def _true_scores(folder: Path, table: _Table) -> dict[str, float]:
    """Those of the tokenizer.model beside it, where that has the same pieces."""
    if not (folder / "tokenizer.model").is_file():
        return {}
    pieces = read_sentencepiece(folder / "tokenizer.model")
    scores = dict(zip(pieces.texts, map(float, pieces.scores), strict=True))
    normal = (text for text, kind in zip(table.texts, table.types, strict=True) if kind == PieceType.NORMAL)
    return scores if not pieces.is_unigram and all(text in scores for text in normal) else {}


def _scores_of_merges(merges: list[Any]) -> dict[str, float]:
    """The pair with the best score is merged first: the order of the merges, as scores."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -float(rank))
    return scores


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether a text is encoded with a space before it."""
    parts = [content.get("normalizer") or {}, content.get("pre_tokenizer") or {}]
    parts += parts[0].get("normalizers") or []
    is_metaspace = any(p.get("type") == "Metaspace" and p.get("prepend_scheme", "always") != "never" for p in parts)
    return is_metaspace or any(p.get("type") == "Prepend" for p in parts)


def _bpe(folder: Path, content: Mapping[str, Any], pre_tokenizer: str | None) -> dict[str, Any]:
    """Byte-level BPE, as GPT-2's."""
    name = pre_tokenizer_name(Tokenizer.from_file(str(folder / "tokenizer.json")), pre_tokenizer)
    if name is None:
        raise LaunchError(
            f"{folder}: the way its tokenizer cuts texts into words has no name in a GGUF that is known here."
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    return {"model": "gpt2", "pre": name, "merges": merges}


def _special(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Ids with a role, and what is put around a text."""
    vocabulary = vocabulary_from_folder(folder)
    ids: dict[str, Any] = {"bos": vocabulary.bos_id, "eos": next(iter(vocabulary.eos_ids), None)}
    texts = {text: i for i, text in enumerate(vocabulary.texts) if text is not None}
    ids["padding"] = texts.get(token_text_of(settings.get("pad_token")) or "")
    values: dict[str, Any] = {}
    for role, token in ids.items():
        stated = config.get(f"{role.removesuffix('ding')}_token_id") if token is None else token
        stated = stated[0] if isinstance(stated, list) and stated else stated
        if type(stated) is int and 0 <= stated < vocab_size:
            values[f"{role}_token_id"] = stated
    return values | {"add_bos_token": bool(vocabulary.prefix), "add_eos_token": bool(vocabulary.suffix)}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}
