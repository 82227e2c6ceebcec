"""Which files of a folder or repository make up the model: rules over names alone, for local and hub alike."""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from serve_app.errors import ModelFileError
from serve_app.options import ModelKind

_GGUF_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

# Vision projectors and importance matrices are kept beside models and are none.
_NO_MODEL = ("mmproj", "imatrix")

GGML_SUFFIX = ".bin"

TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
)
_SIDE_FILES = TOKENIZER_FILES | {
    "config.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
}
SIDE_FOLDER = "additional_chat_templates"


def detect_kind(names: Iterable[str], files: Sequence[str], kind: ModelKind) -> ModelKind:
    """ "plain", "gguf" or "ggml": the kind asked for, else what -f names, else what the files are called; "auto" where
    that tells nothing."""
    if kind != "auto":
        return kind
    if files:
        if all(name.endswith(".safetensors") for name in files):
            return "plain"
        return "ggml" if all(name.endswith(GGML_SUFFIX) for name in files) else "gguf"
    names = list(names)
    if any(_is_plain_weight(name) for name in names):
        return "plain"
    if any(name.endswith(".gguf") for name in names):
        return "gguf"
    return "ggml" if any(map(_is_called_ggml, names)) else "auto"


def choose_files(names: Sequence[str], files: Sequence[str], kind: ModelKind, where: str) -> list[str]:
    """The names to fetch: weights by the rules below, and the small files beside them."""
    found = detect_kind(names, files, kind)
    if found == "auto":
        raise ModelFileError(f"{where}: holds neither .safetensors nor .gguf files")
    if found == "plain":
        weights = choose_plain(names, where)
    elif found == "gguf":
        weights = choose_gguf(names, files, where)
    else:
        weights = [choose_ggml(names, files, where)]
    return [*weights, *(name for name in names if name in _SIDE_FILES or name.startswith(f"{SIDE_FOLDER}/"))]


def choose_gguf(names: Sequence[str], patterns: Sequence[str], where: str) -> list[str]:
    """The shards, in order, of the one GGUF that the patterns name (a name or a glob each), or of the only one.

    Raises ModelFileError where none or several match, or where a shard is missing.
    """
    candidates = [name for name in names if name.endswith(".gguf")]
    if patterns:
        matched = [name for pattern in patterns for name in _matches(names, pattern, where)]
    else:
        matched = [name for name in candidates if not PurePosixPath(name).name.startswith(_NO_MODEL)]
    if not matched:
        raise ModelFileError(f"{where}: holds no .gguf file")
    models = {_model_of(name) for name in matched}
    if len(models) > 1 and not (patterns and len(matched) == len(patterns)):
        listed = ", ".join(_short(PurePosixPath(name).name for name in set(matched)))
        raise ModelFileError(f"{where}: holds several GGUF models, choose one with -f: {listed}")
    if len(models) > 1:
        return list(dict.fromkeys(matched))  # named one by one: the reader says whether they belong together
    stem, count = models.pop()
    if count == 0:
        return matched[:1]
    shards = [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    present = {*names, *matched}
    missing = [shard for shard in shards if shard not in present]
    if missing:
        raise ModelFileError(f"{where}: {PurePosixPath(missing[0]).name} is missing, shard of a split GGUF")
    return shards


def choose_ggml(
    names: Sequence[str], patterns: Sequence[str], where: str, is_ggml: Callable[[str], bool] | None = None
) -> str:
    """The one file of GGML's old container that the patterns name, or the only one.

    is_ggml: whether a name's file is one; None: its name must say so. ModelFileError where none or several are found.
    """
    if patterns:
        matched = [name for pattern in patterns for name in _matches(names, pattern, where)]
    else:
        matched = [name for name in names if (is_ggml or _is_called_ggml)(name)]
    if not matched:
        raise ModelFileError(f"{where}: holds no file of GGML's old container; name one with -f")
    if len(set(matched)) > 1:
        listed = ", ".join(_short(PurePosixPath(name).name for name in set(matched)))
        raise ModelFileError(f"{where}: holds several GGML models, choose one with -f: {listed}")
    return matched[0]


def choose_plain(names: Sequence[str], where: str) -> list[str]:
    """The SafeTensors files of the top folder; Hugging Face's own set where another layout lies beside it."""
    weights = sorted(name for name in names if _is_plain_weight(name))
    if not weights:
        raise ModelFileError(f"{where}: holds no .safetensors file")
    return [name for name in weights if name.startswith("model")] or weights


def _is_called_ggml(name: str) -> bool:
    """As they were published: llama-2-7b.ggmlv3.q4_0.bin."""
    return name.endswith(GGML_SUFFIX) and "ggml" in PurePosixPath(name).name.lower()


def _is_plain_weight(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name


def _matches(names: Sequence[str], pattern: str, where: str) -> list[str]:
    if pattern in names:
        return [pattern]
    matched = [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(PurePosixPath(n).name, pattern)]
    if not matched:
        listed = ", ".join(_short(PurePosixPath(n).name for n in names if n.endswith(".gguf"))) or "none"
        raise ModelFileError(f"{where}: no file matches -f {PurePosixPath(pattern).name}; its .gguf files: {listed}")
    return matched


def _model_of(name: str) -> tuple[str, int]:
    """(stem, shards) of a shard's name, (name, 0) of a single file's."""
    match = _GGUF_SHARD.fullmatch(name)
    return (match["stem"], int(match["count"])) if match else (name, 0)


def _short(names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    return listed if len(listed) <= 12 else [*listed[:12], f"… ({len(listed)} in all)"]
