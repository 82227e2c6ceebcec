"""Where a model's chat templates are, and how they are written down: options, a folder's files, a GGUF's metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from serve_app.errors import ModelFileError
from serve_app.text.tokenizer_files import read_json

DEFAULT: Final = "default"
MORE_FOLDER: Final = "additional_chat_templates"
GGUF_KEY: Final = "tokenizer.chat_template"
_FILE: Final = "chat_template.jinja"


class Templates(NamedTuple):
    """origin: where they come from, for messages. sources: name → Jinja, mostly DEFAULT alone."""

    origin: str
    sources: dict[str, str]


def templates_of_options(jinja_explicit: str | None, chat_template: str | None) -> Templates | None:
    """What -j or else -c names; None without them. ModelFileError for a file that cannot be read, or has none.

    -j: a file that holds Jinja. -c: a .json file with a "chat_template", a file that holds Jinja, or Jinja itself.
    """
    if jinja_explicit:
        return _of_file(Path(jinja_explicit))
    if not chat_template:
        return None
    if "{{" in chat_template or "{%" in chat_template:
        return Templates("--chat-template", {DEFAULT: chat_template})
    return _of_file(Path(chat_template))


def templates_of_folder(folder: Path) -> Templates | None:
    """As transformers finds them: chat_template.jinja and those of additional_chat_templates/, by their file's names;
    else the "chat_template" of tokenizer_config.json (a text, or a list of {name, template}), else of
    chat_template.json. ModelFileError for one that is there but broken.
    """
    path, more = folder / _FILE, sorted((folder / MORE_FOLDER).glob("*.jinja"))
    if path.is_file() or more:
        sources = {DEFAULT: _read_text(path)} if path.is_file() else {}
        return Templates(str(path), sources | {file.stem: _read_text(file) for file in more})
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _of_json(folder / name) if (folder / name).is_file() else None
        if found is not None:
            return found
    return None


def templates_of_gguf(metadata: Mapping[str, Any]) -> Templates | None:
    """Those of a GGUF's metadata; ModelFileError for one that is no text."""
    sources: dict[str, str] = {}
    for key, value in metadata.items():
        if key == GGUF_KEY or key.startswith(GGUF_KEY + "."):
            if not isinstance(value, str):
                raise ModelFileError(f"the GGUF metadata: key {key} is no string")
            sources[key.removeprefix(GGUF_KEY).removeprefix(".") or DEFAULT] = value
    return Templates("the GGUF metadata", sources) if sources else None


def gguf_values(sources: Mapping[str, str]) -> dict[str, Any]:
    """The same as keys and values of a GGUF."""
    values: dict[str, Any] = {
        GGUF_KEY if name == DEFAULT else f"{GGUF_KEY}.{name}": template for name, template in sources.items()
    }
    others = [name for name in sources if name != DEFAULT]
    return values | ({f"{GGUF_KEY}s": others} if others else {})


def write_templates(folder: Path, sources: Mapping[str, str]) -> None:
    """The same as files of a folder, which come before a template in its other files. ModelFileError for a name that
    no file can have: it may lead out of the folder."""
    for name, template in sources.items():
        if "/" in name or "\0" in name:
            raise ModelFileError(f"the chat template's name {name!r} cannot be a file's")
        path = folder / _FILE if name == DEFAULT else folder / MORE_FOLDER / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")


def _of_file(path: Path) -> Templates:
    if path.suffix != ".json":
        return Templates(str(path), {DEFAULT: _read_text(path)})
    found = _of_json(path)
    if found is None:
        raise ModelFileError(f'{path}: has no "chat_template"')
    return found


def _of_json(path: Path) -> Templates | None:
    content = read_json(path)
    value = content.get("chat_template") if isinstance(content, dict) else None
    if value is None:
        return None
    if isinstance(value, list):
        try:
            value = {entry["name"]: entry["template"] for entry in value}
        except (TypeError, KeyError):
            raise ModelFileError(f'{path}: the list "chat_template" needs name and template in each entry') from None
    sources = {DEFAULT: value} if isinstance(value, str) else value
    if not isinstance(sources, dict) or not all(isinstance(t, str) for t in sources.values()) or not sources:
        raise ModelFileError(f'{path}: "chat_template" is neither a text nor a list of them')
    return Templates(str(path), sources)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ModelFileError(f"{path}: is not UTF-8") from None
