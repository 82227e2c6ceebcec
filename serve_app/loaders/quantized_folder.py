"""A quantised SafeTensors folder out of another one or of a GGUF, for every type that there is.

Packed matrices are U8 tensors [rows, bytes per row]; the file's metadata says under QUANTISED which type each has.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from serve_app.loaders.checkpoint import num_bytes
from serve_app.loaders.folder_of_gguf import gguf_sources, write_side_files
from serve_app.loaders.load import stated_args
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.name_map import gguf_name
from serve_app.loaders.quantized import Progress, Source, Step, TokenizerForms, plan_steps, run_steps, stored_tensors
from serve_app.loaders.safetensors import QUANTISED
from serve_app.models.decoder_args import DecoderArgs
from serve_app.quant.imatrix import Importance
from serve_app.quant.mix import ModelFacts, Recipe

_PLAIN = ("F32", "F16", "BF16")
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NOT_COPIED = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json")


def plan_folder(files: ModelFiles, recipe: Recipe, importance: Importance | None) -> list[Step]:
    """The steps from a folder, or a GGUF, to a folder; errors for a model that none can be made of."""
    stored = stored_tensors(files)
    if files.config is None:
        sources, args = gguf_sources(files)
    else:
        _, found = stated_args(files)
        assert isinstance(found, DecoderArgs)
        args = found
        sources = [Source.of(tensor, gguf_name(tensor.name, args.GGUF.architecture)) for tensor in stored]
    has_head = any(source.name == "lm_head.weight" for source in sources)
    facts = ModelFacts(
        args.GGUF.architecture,
        args.n_layers,
        args.n_heads,
        args.n_kv_heads,
        getattr(args, "num_local_experts", 0) or getattr(args, "num_experts", 0),
        not has_head or bool(args.tie_word_embeddings),
    )
    return plan_steps(sources, recipe, facts, importance, needs_gguf=False)


def write_folder(
    folder: Path, files: ModelFiles, steps: Sequence[Step], progress: Progress, tokenizers: TokenizerForms
) -> None:
    """Writes what a model's folder has besides weights, then those under their name, once they are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    if files.config is None:
        write_side_files(folder, files, tokenizers)
    else:
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
