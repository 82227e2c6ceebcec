"""What the command line's options say, as a configuration. Mistakes are LaunchErrors that name the option."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve_app.cli_draft_options import DraftOptions, SpeculativeOptions
from serve_app.cli_grammar import Kind, option_names
from serve_app.cli_isq_options import InSituOptions
from serve_app.cli_options import EngineOptions, ModelOptions
from serve_app.cli_server_options import DeploymentOptions, HttpOptions
from serve_app.cli_toml import Selection, read_selection
from serve_app.config import AppConfig, LogLevel, ModelConfig, SettingError, build_config
from serve_app.errors import LaunchError

# The configuration's section that a group of options fills, as SettingError names them.
_SECTIONS: dict[type, str] = {
    ModelOptions: "model",
    InSituOptions: "isq",
    EngineOptions: "engine",
    HttpOptions: "http",
    DeploymentOptions: "deployment",
    SpeculativeOptions: "speculation",
    DraftOptions: "draft",
}

# How to speculate with a draft model.
_OF_A_DRAFT = ("deadline_ms", "vocab", "draft_sampling")

# How both models come from the hub.
_HUB_FIELDS = ("token_source", "hf_cache", "offline")

Sections = dict[str, dict[str, Any]]


def configuration(kind: Kind | None, is_speculative: bool, groups: dict[type, Any], log: LogLevel) -> AppConfig:
    """The configuration of one command. kind: the target's. Raises LaunchError naming the option or key at fault."""
    sections: Sections = {section: asdict(groups[group]) for group, section in _SECTIONS.items() if group in groups}
    selection = None
    if kind == "toml":
        selection = read_selection(_selector_file(groups[ModelOptions]))
        sections["model"] |= {"model": None, "files": ()}
    else:
        sections["model"] |= _target(kind, groups[ModelOptions])
    sections["model"] = _but_defaults(sections["model"])
    if "isq" in sections:
        sections["isq"] = _isq(sections["isq"])
    if "speculation" in sections:
        sections["draft"] = _draft(sections["draft"])
        isq_type = sections["draft"].pop("isq", None)
        sections["draft.isq"] = {} if isq_type is None else {"type": isq_type}
        sections["speculation"] = _but_defaults(sections["speculation"])
    if "engine" in sections:
        engine = sections["engine"]
        engine["paged_attention"] = not engine.pop("no_paged_attn")
        engine["cuda_graphs"] = not engine.pop("no_cuda_graphs")
        engine["overlap"] = not engine.pop("no_overlap")
    if "http" in sections:
        sections["http"]["api_keys"] = sections["http"]["api_keys"] or ()
    if "deployment" in sections:
        sections["deployment"]["model_nodes"] = sections["deployment"]["model_nodes"] or ()
    if selection is not None:
        _add(selection, sections)
    if "speculation" in sections:
        sections["speculation"] = _speculation(sections, is_speculative)
    if isq := sections.pop("isq", None):
        sections["model"]["isq"] = isq
    try:
        return build_config({**sections, "log": log})
    except SettingError as error:
        if error.section is None or error.name is None:
            raise
        raise LaunchError(f"{_place(error.section, error.name, selection)} {error}.") from None


@dataclass(frozen=True, slots=True)
class _Names:
    """The options of one of the two models."""

    model: str
    files: str
    gqa: str


_TARGET = _Names("-m", "-f", "--gqa")
_DRAFT = _Names("-d", "--draft-file", "--draft-gqa")


def _target(kind: Kind | None, options: ModelOptions) -> dict[str, Any]:
    """The model section's fields that the kind and -f decide."""
    found = _located(kind, options.model, options.files, options.gqa, _TARGET)
    if found["model"] is None and kind not in (None, "run"):
        raise LaunchError(f"The kind {kind} needs a model: give its hub id, folder or file with -m.")
    if found["model"] is None and options.revision:
        raise LaunchError("The option --revision belongs to a model from the hub (-m).")
    return found


def _draft(options: dict[str, Any]) -> dict[str, Any]:
    """The draft section's given fields."""
    options = {name.removeprefix("draft_"): value for name, value in options.items()}
    found = _located(options["kind"], options["model"], options["files"], options["gqa"], _DRAFT)
    return _but_defaults(options | found)


def _located(
    kind: str | None, model: str | None, files_given: Sequence[str] | None, gqa: int | None, names: _Names
) -> dict[str, Any]:
    """Model, kind and files of one model."""
    files = tuple(name.strip() for given in files_given or () for name in given.split(";") if name.strip())
    if files_given and not files:
        raise LaunchError(f"The option {names.files} names no file.")
    if kind == "plain" and files:
        raise LaunchError(
            f"The option {names.files} belongs to the kind gguf; a plain model is a folder or a hub id ({names.model})."
        )
    if gqa is not None and kind in ("gguf", "plain"):
        raise LaunchError(f"The option {names.gqa} belongs to the kind ggml; a {kind} model says its key heads itself.")
    if model is None and files:
        model, files = _folder_of(files, names)
    if kind in (None, "run", "auto"):
        kind = "gguf" if files and all(name.endswith(".gguf") for name in files) else "auto"
    return {"model": model, "kind": kind, "files": files}


def _folder_of(files: tuple[str, ...], names: _Names) -> tuple[str, tuple[str, ...]]:
    """Files of one local folder, which no option names: that folder and their names in it."""
    folders = {str(Path(name).expanduser().parent) for name in files}
    if len(folders) > 1:
        raise LaunchError(
            f"The files given with {names.files} lie in several folders: name the one with {names.model}, or move them "
            "together."
        )
    return folders.pop(), tuple(Path(name).name for name in files)


_MODEL_DEFAULTS = dict(ModelConfig())


def _but_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """The options that say something."""
    return {
        name: value
        for name, value in options.items()
        if value is not None and value is not False and value != _MODEL_DEFAULTS.get(name)
    }


def _isq(options: dict[str, Any]) -> dict[str, Any]:
    """The isq section's given fields."""
    organization = options.pop("organization")
    given = {name: value for name, value in options.items() if value is not None}
    if organization != "default":
        given |= {"is_pure": organization == "pure", "experts_only": organization == "moqe"}
    return given


def _speculation(sections: Sections, is_speculative: bool) -> dict[str, Any]:
    """The speculation section, of the options for it and those for the draft model, which it takes out of sections."""
    given, draft, isq = (sections.pop(name) for name in ("speculation", "draft", "draft.isq"))
    if "model" not in draft:
        of_draft = [_option("draft", name) for name in draft] + [_option("draft.isq", name) for name in isq]
        of_draft += [_option("speculation", name) for name in _OF_A_DRAFT if name in given]
        if of_draft:
            raise LaunchError(f"The option {of_draft[0]} belongs to a draft model: give it with -d.")
        if given and "use" not in given:
            option = _option("speculation", next(iter(given)))
            raise LaunchError(
                f"The option {option} belongs to speculative decoding: give a draft model with -d, or --speculation."
            )
        if is_speculative and given.get("use") in (None, "off"):
            raise LaunchError("The kind speculative needs a draft model: give its hub id, folder or file with -d.")
        return given
    for name in _HUB_FIELDS:
        if name in sections["model"]:
            draft.setdefault(name, sections["model"][name])
    if isq:
        if "cache" in sections["isq"]:
            isq["cache"] = sections["isq"]["cache"]
        draft["isq"] = isq
    maps_text = given.pop("vocab", "same") == "text"
    return {"use": "auto", **given, "maps_text": maps_text, "draft": draft}


def _selector_file(options: ModelOptions) -> str:
    if options.model is not None:
        raise LaunchError("The option -m does not go with the kind toml, whose file (-f) names the model.")
    if options.files is None or len(options.files) != 1:
        raise LaunchError("The kind toml needs one file: give it with -f.")
    return options.files[0]


def _add(selection: Selection, sections: Sections) -> None:
    """Adds what the file says. Raises LaunchError for what it may not say, or an option says too."""
    for section, values in selection.sections.items():
        if section not in sections:
            key = next(key for (of, _), key in selection.keys.items() if of == section)
            raise LaunchError(f"{selection.file}: {key} is not for this command.")
        for name, value in values.items():
            if name in sections[section]:
                option = _option(section, name)
                raise LaunchError(f"{selection.file}: {selection.keys[section, name]} says what {option} says too.")
            sections[section][name] = value


def _place(section: str, name: str, selection: Selection | None) -> str:
    """Where a setting was given."""
    if selection is not None and (section, name) in selection.keys:
        return f"{selection.file}: {selection.keys[section, name]}"
    return f"The option {_option(section, name)}"


def _option(section: str, name: str) -> str:
    if section == "draft.isq":
        section, name = "draft", "isq"
    group = next(group for group, of in _SECTIONS.items() if of == section)
    if section == "draft":
        name = f"draft_{name}"
    elif name in ("is_pure", "experts_only"):
        name = "organization"
    return option_names(group)[name][0]
