"""The files in which mistral.rs selects models: `sirocco toml -f FILE`.

[model] describes a plain model (model_id) or a quantised one (quantized_model_id), [speculative.draft_model] likewise,
beside gamma in [speculative]: the most tokens that are proposed, here as many as pay, so that a larger gamma than we
have is taken as ours. draft_sampling there is a key of our own. What is said there may not be said by an option again.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.errors import LaunchError
from serve_app.options import MAX_DRAFT_TOKENS

# Key → the configuration's section and field, and the value's type. An empty field: taken and not needed.
_ISQ_KEYS: dict[str, tuple[str, str, type]] = {
    "in_situ_quant": ("isq", "type", str),
    "organization": ("isq", "organization", str),
    "imatrix": ("isq", "imatrix", str),
    "calibration_file": ("isq", "calibration_file", str),
    "topology": ("isq", "topology", str),
}
_COMMON_KEYS = _ISQ_KEYS | {
    "arch": ("model", "arch", str),
    "dtype": ("model", "dtype", str),
    "max_seq_len": ("model", "max_seq_len", int),
    "hf_cache_path": ("model", "hf_cache", str),
    # By it mistral.rs divides a model among devices.
    "max_batch_size": ("model", "", int),
}
_PLAIN_KEYS = _COMMON_KEYS | {"model_id": ("model", "model", str)}
_QUANTIZED_KEYS = _COMMON_KEYS | {
    "quantized_model_id": ("model", "model", str),
    "quantized_filename": ("model", "files", str),
    "tok_model_id": ("model", "tokenizer", str),
    "gqa": ("model", "gqa", int),
}
_TOP_KEYS = ("model", "speculative", "tokenizer_json")
_SPECULATIVE_KEYS = ("gamma", "draft_model", "draft_sampling")

# What a key tells of, where this version does not have it.
_LATER = {
    "anymoe": "AnyMoE",
    "xlora_model_id": "the kind x-lora",
    "order": "the kind x-lora",
    "tgt_non_granular_index": "the kind x-lora",
    "adapter_model_ids": "the kind lora",
    "adapters_model_id": "the kind lora",
    "max_edge": "the kind vision-plain",
    "max_num_images": "the kind vision-plain",
    "max_image_length": "the kind vision-plain",
    "dac_model_id": "the kind speech",
    "from_uqff": "UQFF",
    "write_uqff": "UQFF",
}


@dataclass(frozen=True, slots=True)
class Selection:
    """What a file says: by section of the configuration, as cli_config has them, the fields that it sets.

    keys: (section, field) → where in the file it is said.
    """

    file: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)

    def set(self, section: str, name: str, value: Any, key: str) -> None:
        self.sections.setdefault(section, {})[name] = value
        self.keys[section, name] = key


def read_selection(file: str) -> Selection:
    """Raises LaunchError with one sentence that names the file and the key."""
    try:
        content = tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"The file {file} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LaunchError(f"The file {file} is not TOML: {error}.") from error
    selection = Selection(file)
    _refuse_unknown(selection, content, "the file", _TOP_KEYS)
    _read_model(selection, _table(selection, content, "model", "the file"), "[model]", "")
    if "speculative" in content:
        speculative = _table(selection, content, "speculative", "the file")
        _refuse_unknown(selection, speculative, "[speculative]", _SPECULATIVE_KEYS)
        draft = _table(selection, speculative, "draft_model", "[speculative]")
        _read_model(selection, draft, "[speculative.draft_model]", "draft")
        gamma = _value(selection, speculative, "gamma", int, "[speculative]")
        selection.set("speculation", "max_tokens", min(gamma, MAX_DRAFT_TOKENS), "gamma in [speculative]")
        if "draft_sampling" in speculative:
            sampling = _value(selection, speculative, "draft_sampling", str, "[speculative]")
            selection.set("speculation", "draft_sampling", sampling, "draft_sampling in [speculative]")
    if "tokenizer_json" in content:
        tokenizer = _value(selection, content, "tokenizer_json", str, "the file")
        for section in selection.sections.keys() & {"model", "draft"}:
            if "tokenizer" not in selection.sections[section]:
                selection.set(section, "tokenizer", tokenizer, "tokenizer_json")
    return selection


def _read_model(selection: Selection, table: Mapping[str, Any], where: str, draft: str) -> None:
    """The table of one model. draft: the section that takes the place of model, for a draft model; else empty."""
    is_plain = "model_id" in table
    if not is_plain and "quantized_model_id" not in table:
        _refuse_unknown(selection, table, where, {**_PLAIN_KEYS, **_QUANTIZED_KEYS})
        raise LaunchError(f"{selection.file}: {where} names no model: give model_id or quantized_model_id.")
    known = _PLAIN_KEYS if is_plain else _QUANTIZED_KEYS
    _refuse_unknown(selection, table, where, known)
    for key in table:
        part, name, kind = known[key]
        value = _value(selection, table, key, kind, where)
        section = part if not draft else draft if part == "model" else f"{draft}.{part}"
        if name == "organization":
            _set_organization(selection, section, value, f"{key} in {where}")
        elif name:
            # mistral.rs has blanks between the names, and a semicolon since.
            value = tuple(value.replace(";", " ").split()) if name == "files" else value
            selection.set(section, name, value, f"{key} in {where}")
    files = selection.sections[draft or "model"].get("files", ())
    if is_plain:
        weights = "plain"
    elif "gqa" in table:
        weights = "ggml"
    else:
        weights = "gguf" if all(file.endswith(".gguf") for file in files) else "auto"
    selection.set(draft or "model", "kind", weights, where)


def _set_organization(selection: Selection, section: str, value: str, key: str) -> None:
    if value not in ("default", "moqe"):
        raise LaunchError(f"{selection.file}: {key} should be default or moqe.")
    if value == "moqe":
        selection.set(section, "experts_only", True, key)


def _refuse_unknown(selection: Selection, table: Mapping[str, Any], where: str, known: Any) -> None:
    for key in table:
        if key in known:
            continue
        if key in _LATER:
            raise LaunchError(f"{selection.file}: {key} in {where} is for {_LATER[key]}, not a part of this version.")
        if key in _PLAIN_KEYS or key in _QUANTIZED_KEYS:
            other = "model_id" if known is _PLAIN_KEYS else "quantized_model_id"
            raise LaunchError(f"{selection.file}: {key} in {where} does not go with {other}.")
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise LaunchError(f"{selection.file}: there is no key {key} in {where}{hint}")


def _table(selection: Selection, parent: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise LaunchError(f"{selection.file}: {where} needs the table {key}.")
    return value


def _value(selection: Selection, table: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in table:
        raise LaunchError(f"{selection.file}: {where} needs the key {key}.")
    if type(table[key]) is not kind:
        words = {str: "a string", int: "a whole number"}[kind]
        raise LaunchError(f"{selection.file}: {key} in {where} should be {words}.")
    return table[key]
