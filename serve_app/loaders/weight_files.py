"""Finds a model's weight files, local or on the hub. No torch."""

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve_app.errors import ModelFileError
from serve_app.gguf_file import OLD_MAGICS
from serve_app.loaders import hub
from serve_app.loaders.file_choice import (
    GGML_SUFFIX,
    TOKENIZER_FILES,
    choose_files,
    choose_ggml,
    choose_gguf,
    choose_plain,
    detect_kind,
)
from serve_app.options import ModelSource

EMBEDDED_MODEL = Path(__file__).parent.parent / "assets" / "stories3M-Q8_0.gguf"
"""Served where no model is named."""

_INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Weights:
    """Weight files, shards in order, and the folder where the model's other files are."""

    kind: Literal["gguf", "ggml", "plain"]
    folder: Path
    files: tuple[Path, ...]


def find_weights(source: ModelSource) -> Weights:
    """The weight files of a source; from the hub where its model is no local path.

    Raises ModelFileError where nothing or more than one model fits, LaunchError where the hub is needed and away.
    """
    if source.model is None and not source.files:
        return Weights("gguf", EMBEDDED_MODEL.parent, (EMBEDDED_MODEL,))
    root = Path("." if source.model is None else source.model).expanduser()
    if root.is_file():
        return _single_file(root, source)
    return _in_folder(root, source) if root.is_dir() else _on_hub(str(source.model), source)


def locate_tokenizer(name: str, source: ModelSource) -> Path:
    """The folder or file of --tokenizer: a local path or a hub id; errors as in find_weights."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not hub.is_hub_id(name):
        raise ModelFileError(f"{name}: no such file or folder, and no valid hub id")
    return hub.fetch(name, source, lambda names: [n for n in names if n in TOKENIZER_FILES])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelFileError where it cannot be read or is none."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFileError(f"{path}: is larger than {_MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: is no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: is no JSON object")
    return value


def _single_file(path: Path, source: ModelSource) -> Weights:
    if source.files:
        raise ModelFileError(f"{path}: -f names files of a folder or repository, but -m is a file itself")
    kind = _kind_of(path)
    if source.kind not in ("auto", kind):
        raise ModelFileError(f"{path}: is no file for the model kind {source.kind}")
    return Weights(kind, path.parent, (path,))


def _kind_of(path: Path) -> Literal["gguf", "ggml", "plain"]:
    """What a file is: SafeTensors by its name, GGML's containers by their first bytes."""
    if path.suffix == ".safetensors":
        return "plain"
    return "ggml" if _has_old_magic(path) else "gguf"


def _has_old_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) in OLD_MAGICS
    except OSError:
        return False  # who opens it says what is wrong with it


def _on_hub(name: str, source: ModelSource) -> Weights:
    if not hub.is_hub_id(name):
        raise ModelFileError(f"{name}: no such file or folder, and no valid hub id")
    folder = hub.fetch(name, source, lambda names: choose_files(names, source.files, source.kind, name))
    # The cache may hold more than was chosen now, or be all there is (offline): the same rules choose from it.
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    kind = detect_kind(names, source.files, source.kind)
    if kind == "gguf":
        return Weights("gguf", folder, tuple(folder / n for n in choose_gguf(names, source.files, name)))
    if kind == "ggml":
        return Weights("ggml", folder, (folder / choose_ggml(names, source.files, name),))
    return _in_folder(folder, source)


def _in_folder(folder: Path, source: ModelSource) -> Weights:
    names = [p.name for p in folder.iterdir()]
    kind = detect_kind(names, source.files, source.kind)
    if kind == "auto" and any(_is_ggml(folder, name) for name in names):
        kind = "ggml"
    if kind == "auto":
        raise ModelFileError(f"{folder}: holds neither .safetensors nor .gguf files")
    if kind in ("gguf", "ggml"):
        files = _ggml_file(folder, source.files) if kind == "ggml" else _gguf_files(folder, source.files)
        is_old = kind == "ggml" or (source.kind == "auto" and _has_old_magic(files[0]))
        return Weights("ggml" if is_old else "gguf", files[0].parent, files)
    if (folder / _INDEX).is_file():
        return Weights("plain", folder, _indexed_files(folder))
    chosen = source.files or choose_plain(names, str(folder))
    return Weights("plain", folder, tuple(folder / name for name in chosen))


def _gguf_files(folder: Path, patterns: Sequence[str]) -> tuple[Path, ...]:
    if not patterns:
        return tuple(folder / n for n in choose_gguf([p.name for p in folder.iterdir()], (), str(folder)))
    names, wanted = _named(folder, patterns)
    return tuple(Path(n) for n in choose_gguf(names, wanted, str(folder)))


def _ggml_file(folder: Path, patterns: Sequence[str]) -> tuple[Path, ...]:
    if not patterns:
        names = [p.name for p in folder.iterdir()]
        return (folder / choose_ggml(names, (), str(folder), lambda name: _is_ggml(folder, name)),)
    names, wanted = _named(folder, patterns)
    return (Path(choose_ggml(names, wanted, str(folder))),)


def _is_ggml(folder: Path, name: str) -> bool:
    return name.endswith(GGML_SUFFIX) and _has_old_magic(folder / name)


def _named(folder: Path, patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files beside those that -f names, and its patterns, all with their paths.

    -f may name files anywhere, relative to the folder; a glob's * stands in the file's name only.
    """
    names: list[str] = []
    wanted = []
    for pattern in patterns:
        path = folder / Path(pattern).expanduser()
        if path.parent.is_dir():
            names += [str(p) for p in path.parent.iterdir() if p.is_file()]
        wanted.append(str(path) if path.is_file() else f"{glob.escape(str(path.parent))}/{path.name}")
    return list(dict.fromkeys(names)), wanted


def _indexed_files(folder: Path) -> tuple[Path, ...]:
    """The shards that the index names, all present."""
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index}: key 'weight_map' is missing or no JSON object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelFileError(f"{index}: tensor {name!r} is in no file of this folder")
    files = tuple(folder / name for name in sorted(set(weight_map.values())))
    for file in files:
        if not file.is_file():
            raise ModelFileError(f"{file}: shard named by {_INDEX} is missing")
    return files
