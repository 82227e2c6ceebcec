"""A quantised SafeTensors folder out of another one, for every type that there is.

Packed matrices are U8 tensors [rows, bytes per row]; the file's metadata says under QUANTISED which type each has.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from serve_app.errors import LaunchError
from serve_app.loaders.checkpoint import num_bytes
from serve_app.loaders.load import find_args
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.name_map import gguf_name
from serve_app.loaders.quantized import Progress, Source, Step, plan_steps, run_steps, stored_tensors
from serve_app.loaders.safetensors import QUANTISED
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import ModelFacts, Recipe

_PLAIN = ("F32", "F16", "BF16")
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NOT_COPIED = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json")


def plan_folder(files: ModelFiles, recipe: Recipe, importance: Importance | None) -> list[Step]:
    """The steps from a folder to another; LaunchError where the source is no folder."""
    if files.config is None:
        raise LaunchError(
            f"{files.model_name}: a folder of SafeTensors is made of a model that is one, not of a GGUF; "
            "give -o a name that ends in .gguf."
        )
    config: Mapping[str, Any] = files.config
    stored = stored_tensors(files)
    _, args = find_args(files)
    has_head = any(tensor.name == "lm_head.weight" for tensor in stored)
    facts = ModelFacts(
        str(config.get("model_type", "")),
        args.n_layers,
        args.n_heads,
        args.n_kv_heads,
        int(config.get("num_local_experts") or config.get("num_experts") or 0),
        not has_head or bool(config.get("tie_word_embeddings", False)),
    )
    form = args.GGUF
    sources = [Source.of(tensor, gguf_name(tensor.name, form.architecture)) for tensor in stored]
    return plan_steps(sources, recipe, facts, importance, needs_gguf=False)


def write_folder(folder: Path, files: ModelFiles, steps: Sequence[Step], progress: Progress) -> None:
    """Copies what the model's folder has besides weights, then writes those under their name, once they are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(files.folder.iterdir()):
        if path.is_file() and not path.name.endswith(_NOT_COPIED):
            shutil.copy(path, folder / path.name)
    part = folder / (_WEIGHTS + ".part")
    try:
        with part.open("wb") as file:
            file.write(_header(steps))
            run_steps(steps, _File(file), progress)
        # One of an earlier model there would send readers to other weights.
        (folder / _INDEX).unlink(missing_ok=True)
        part.replace(folder / _WEIGHTS)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class _File:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def begin(self) -> None:
        """Tensors follow each other without a gap."""

    def write(self, data: Any) -> None:
        """See Sink."""
        self._file.write(data)


def _header(steps: Sequence[Step]) -> bytes:
    entries: dict[str, Any] = {}
    types: dict[str, str] = {}
    at = 0
    for step in steps:
        shape = list(step.source.shape)
        dtype, size = step.form.name, num_bytes(step.form, shape)
        if dtype not in _PLAIN:
            types[step.name] = dtype
            shape[-1] = step.form.row_bytes(shape[-1])
            dtype = "U8"
        entries[step.name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    entries = {"__metadata__": {"format": "pt", QUANTISED: json.dumps(types)}, **entries}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
