"""From what the user named to the files of a model, and the facts about it that need no weights. No torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from serve_app.errors import ModelFileError
from serve_app.ggml_file import open_ggml
from serve_app.gguf_file import GgufFile, open_gguf
from serve_app.loaders import generation_config
from serve_app.loaders.architecture import config_as, metadata_as
from serve_app.loaders.file_choice import GGML_SUFFIX
from serve_app.loaders.weight_files import Weights, find_weights, locate_tokenizer, read_json
from serve_app.options import DType, IsqOptions, ModelSource, SamplingParams

# What transformers takes for a Llama whose configuration does not say.
_HF_CONTEXT = 2048
_GGUF_END_KEYS = ("eos", "eot", "eom")
_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files, all local, and its facts.

    folder: where the weights lie, perhaps with chat templates beside them; config: of config.json (plain), metadata of
    a GGUF, or what GGML's old container says in its terms; exactly one of the two is set, with the architecture that
    the user has named. tokenizer_source: what text.tokenizer.open_tokenizer takes. max_seq_len: tokens of prompt and
    output together. eos_ids: as the model's configuration has them, first the main one.
    dtype, jinja_explicit, chat_template, isq: the user's options as given.
    """

    kind: Literal["gguf", "ggml", "plain"]
    model_name: str
    folder: Path
    weight_files: tuple[Path, ...]
    config: dict[str, Any] | None
    gguf_metadata: dict[str, Any] | None
    tokenizer_source: Path | Mapping[str, Any]
    generation_config: dict[str, Any]
    max_seq_len: int
    eos_ids: tuple[int, ...]
    dtype: DType = "auto"
    jinja_explicit: str | None = None
    chat_template: str | None = None
    isq: IsqOptions | None = None

    @property
    def architecture(self) -> Any:
        """What the file says it is; None where it does not."""
        if self.gguf_metadata is not None:
            return self.gguf_metadata.get("general.architecture")
        named = (self.config or {}).get("architectures")
        return named[0] if isinstance(named, list) and named else None

    @property
    def config_file(self) -> str:
        """Where the arguments of the model come from, for error messages."""
        return str(self.folder / "config.json" if self.kind == "plain" else self.weight_files[0])

    def sampling_defaults(self) -> SamplingParams:
        """What a request that names nothing gets; see generation_config.sampling_defaults."""
        file = str(self.folder / "generation_config.json")
        return generation_config.sampling_defaults(self.generation_config, file)


def resolve(source: ModelSource) -> ModelFiles:
    """Finds, and where needed downloads, a model's files and reads everything but the weights.

    Raises ModelFileError naming the file and the key at fault, LaunchError where the hub is needed and away, or an
    architecture named by -a is none.
    """
    weights = find_weights(source)
    folder = weights.folder
    config = metadata = None
    if weights.kind != "plain":
        with _open(weights, source) as file:
            metadata = metadata_as(file.metadata, source.arch)
            weights = replace(weights, files=file.paths)
        length, end_ids = _gguf_facts(metadata, str(weights.files[0]))
    else:
        file_name = str(folder / "config.json")
        config = config_as(read_json(folder / "config.json"), source.arch)
        length = _context({"max_position_embeddings": _HF_CONTEXT, **config}, "max_position_embeddings", file_name)
        length = _stretched(length, config)
        end_ids = generation_config.token_ids(config.get("eos_token_id"), file_name, "eos_token_id")
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    end_ids += generation_config.token_ids(generation.get("eos_token_id"), str(generation_file), "eos_token_id")
    return ModelFiles(
        kind=weights.kind,
        model_name=_model_name(source, weights),
        folder=folder,
        weight_files=weights.files,
        config=config,
        gguf_metadata=metadata,
        tokenizer_source=_tokenizer_source(source, folder, metadata),
        generation_config=generation,
        max_seq_len=length if source.max_seq_len is None else min(length, source.max_seq_len),
        eos_ids=tuple(dict.fromkeys(end_ids)),
        dtype=source.dtype,
        jinja_explicit=source.jinja_explicit,
        chat_template=source.chat_template,
        isq=source.isq,
    )


def _open(weights: Weights, source: ModelSource) -> GgufFile:
    if weights.kind == "ggml":
        return open_ggml(weights.files[0], source.gqa)
    return open_gguf(weights.files[0] if len(weights.files) == 1 else weights.files)


def _model_name(source: ModelSource, weights: Weights) -> str:
    """The hub id; else the name of the folder for SafeTensors and of the file, without shard number, for GGUF."""
    if source.model is not None and not Path(source.model).expanduser().exists():
        return source.model
    if weights.kind != "plain":
        return _SHARD_SUFFIX.sub("", weights.files[0].name.removesuffix(".gguf").removesuffix(GGML_SUFFIX))
    return weights.folder.resolve().name


def _tokenizer_source(
    source: ModelSource, folder: Path, metadata: Mapping[str, Any] | None
) -> Path | Mapping[str, Any]:
    if source.tokenizer is not None:
        return locate_tokenizer(source.tokenizer, source)
    if metadata is not None and "tokenizer.ggml.model" in metadata:
        return metadata
    return folder


def _context(values: Mapping[str, Any], key: str, file: str) -> int:
    """A context length; ModelFileError where it is missing or absurd."""
    value = values.get(key)
    if type(value) is not int or not 1 <= value < 2**31:
        raise ModelFileError(f"{file}: key {key!r} is missing or no context length")
    return value


def _stretched(length: int, config: Mapping[str, Any]) -> int:
    """A context length, or that of a `dynamic` rope: its factor says how much longer texts may be."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or "dynamic" not in (rope.get("rope_type"), rope.get("type")):
        return length
    factor = rope.get("factor")
    return int(length * factor) if isinstance(factor, int | float) and factor > 1 else length


def _gguf_facts(metadata: Mapping[str, Any], file: str) -> tuple[int, tuple[int, ...]]:
    """Context length and end-of-text ids of a GGUF."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError(f"{file}: key 'general.architecture' is missing or no text")
    ends: tuple[int, ...] = ()
    for name in _GGUF_END_KEYS:
        key = f"tokenizer.ggml.{name}_token_id"
        ends += generation_config.token_ids(metadata.get(key), file, key)
    return _context(metadata, f"{architecture}.context_length", file), ends
