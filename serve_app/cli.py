"""The command line: argv → Invocation. Grammar: `sirocco [COMMAND] [OPTIONS] [KIND] [OPTIONS]`.

COMMAND is serve (also when left out), chat, config or doctor; KIND is gguf, plain or run. Options stand before or after
the kind, as users of mistralrs-server write them. Every mistake ends as one sentence in a LaunchError.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer
from pydantic import ValidationError
from typer.core import TyperCommand

from serve_app import __version__
from serve_app.cli_options import (
    ChatOptions,
    DeploymentOptions,
    DoctorOptions,
    EngineOptions,
    HttpOptions,
    LogOptions,
    ModelOptions,
)
from serve_app.config import AppConfig
from serve_app.errors import LaunchError

Command = Literal["serve", "chat", "config", "doctor"]
Kind = Literal["gguf", "plain", "run"]

COMMANDS: tuple[Command, ...] = get_args(Command)
KINDS: tuple[Kind, ...] = get_args(Kind)

# Kinds that the seed's and mistral.rs's users know, and that this version does not serve.
LATER_KINDS = (
    "diffusion",
    "embedding",
    "ggml",
    "lora",
    "lora-ggml",
    "lora-gguf",
    "lora-plain",
    "multimodal-plain",
    "speculative",
    "speech",
    "toml",
    "vision-plain",
    "x-lora",
    "x-lora-ggml",
    "x-lora-gguf",
    "x-lora-plain",
)

# Other programs' names for options of ours.
ALIASES = {
    "--model": "--model-id",
    "--quantized-model-id": "--model-id",
    "--quantized-file": "--quantized-filename",
    "--tok-model-id": "--tokenizer",
    "--max-num-batched-tokens": "--max-batched-tokens",
    "--serve-ip": "--host",
}

GROUPS: dict[Command, tuple[type, ...]] = {
    "serve": (ModelOptions, EngineOptions, HttpOptions, DeploymentOptions, LogOptions),
    "config": (ModelOptions, EngineOptions, HttpOptions, DeploymentOptions, LogOptions),
    "chat": (ModelOptions, EngineOptions, ChatOptions, LogOptions),
    "doctor": (DoctorOptions,),
}

ABOUT: dict[Command, str] = {
    "serve": "Serve a model over OpenAI's HTTP API.",
    "chat": "Talk to a model in this terminal, on the same engine, without a server.",
    "config": "Print the Serve config file for the same arguments as serve, ready for `serve deploy`.",
    "doctor": "Print what was found on this machine, and what of it is used.",
}

KIND_ABOUT: dict[Kind, str] = {
    "gguf": "The model is a GGUF file: -m names its folder, repository or the file itself, -f the file in it.",
    "plain": "The model is a folder or repository with SafeTensors and config.json.",
    "run": "The model's kind is found out from its files.",
}

OVERVIEW = """Commands: [bold]serve[/] (when none is given), [bold]chat[/] in this terminal, [bold]config[/] for \
`serve deploy`, [bold]doctor[/] for this machine.

Kinds: [bold]gguf[/], [bold]plain[/] (SafeTensors), [bold]run[/] (found out by itself). `sirocco COMMAND KIND --help` \
explains each.

Without a kind and a model, a tiny storyteller that comes with Sirocco is served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """What the command line asks for. chat is set for the command chat."""

    command: Command
    config: AppConfig = field(default_factory=AppConfig)
    chat: ChatOptions = field(default_factory=ChatOptions)
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class _Words:
    """A command line taken apart: the two words, and the options in their order."""

    command: Command | None
    kind: Kind | None
    options: list[str]


def parse(argv: Sequence[str]) -> Invocation | None:
    """What argv (without the program's name) asks for; None when it was answered here (--help, --version).

    Raises LaunchError with one sentence.
    """
    words = _take_apart(argv)
    name = words.command or "serve"
    command = _click_command(name, words.kind)
    program = f"sirocco {words.command or f'[{"|".join(COMMANDS)}]'}"
    try:
        result = command.main(words.options, prog_name=program, standalone_mode=False)
    except Exception as error:
        if not isinstance(error, _USAGE_ERRORS):
            raise
        raise LaunchError(f"{_sentence(error.format_message())} See sirocco {name} --help.") from error
    return result if isinstance(result, Invocation) else None


# Typer's own copy of click in new versions, click itself in older ones.
_USAGE_ERRORS: Any = typer.BadParameter.__mro__[2]


# The configuration's section that a group of options fills.
_SECTIONS: dict[type, str] = {
    ModelOptions: "model",
    EngineOptions: "engine",
    HttpOptions: "http",
    DeploymentOptions: "deployment",
}


def option_names(group: type) -> dict[str, tuple[str, ...]]:
    """Field → option names of one group, e.g. port → ('--port', '-p')."""
    hints = get_type_hints(group, include_extras=True)
    names = {}
    for field in fields(group):
        info = hints[field.name].__metadata__[0]
        names[field.name] = (info.default, *(info.param_decls or ()))
    return names


def _take_apart(argv: Sequence[str]) -> _Words:
    """Finds command and kind among the options: options may stand on both sides of either."""
    takes_value = _known_options()
    command: Command | None = None
    kind: Kind | None = None
    options: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word.startswith("-") and word != "-":
            name, equals, value = word.partition("=")
            if not name.startswith("--") and len(name) > 2:
                name, equals, value = word[:2], "=", word[2:].removeprefix("=")
            name = ALIASES.get(name, name)
            if name not in takes_value:
                raise LaunchError(_no_such_option(name, takes_value))
            options += [name]
            if equals and not takes_value[name]:
                raise LaunchError(f"The option {name} takes no value.")
            if takes_value[name]:
                options += [value if equals else _value_of(name, rest)]
        elif word in COMMANDS and command is None and kind is None:
            command = word
        elif word in KINDS and kind is None:
            kind = word
        elif word in LATER_KINDS:
            raise LaunchError(f"The model kind {word} is not part of this version, which serves gguf, plain and run.")
        else:
            raise LaunchError(_unexpected(word, kind))
    if command == "doctor" and kind is not None:
        raise LaunchError(f"The command doctor looks at the machine, not at a model: leave out {kind}.")
    return _Words(command, kind, options)


def _known_options() -> dict[str, bool]:
    """Every option name of every command → whether a value follows."""
    known = {"--help": False, "-h": False, "--version": False}
    for group in {group for groups in GROUPS.values() for group in groups}:
        hints = get_type_hints(group)
        for field, names in option_names(group).items():
            known.update(dict.fromkeys(names, hints[field] is not bool))
    return known


def _value_of(name: str, rest: Any) -> str:
    value: str | None = next(rest, None)
    if value is None:
        raise LaunchError(f"The option {name} needs a value.")
    return value


def _no_such_option(name: str, known: dict[str, bool]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"There is no option {name}" + (f"; did you mean {near[0]}?" if near else ".")


def _unexpected(word: str, kind: str | None) -> str:
    if kind is not None:
        return f"Only options may follow the kind {kind}, not {word!r}."
    return f"{word!r} is neither a command ({', '.join(COMMANDS)}) nor a model kind ({', '.join(KINDS)})."


def _sentence(text: str) -> str:
    text = " ".join(text.split()).replace("Value error, ", "").replace("Input should", "it should")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


class _Command(TyperCommand):
    def get_help_option(self, ctx: Any) -> Any:
        """The --help option, shown like the other flags."""
        option: Any = super().get_help_option(ctx)
        if option is not None:
            option.metavar = ""
        return option


def _click_command(command: Command, kind: Kind | None) -> Any:
    """The Typer command for one command and kind; only this one is built, since building them all takes longer."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    about = ABOUT[command] if kind is None else f"{ABOUT[command]} {KIND_ABOUT[kind]}"
    words = "" if command == "doctor" else f" {kind or '[gguf|plain|run]'} [OPTIONS]"
    app.command(
        command,
        cls=_Command,
        help=about if kind or command == "doctor" else f"{about}\n\n{OVERVIEW}",
        options_metavar=f"[OPTIONS]{words}",
        context_settings={"help_option_names": ["--help", "-h"]},
    )(_callback(command, kind))
    return typer.main.get_command(app)


def _callback(command: Command, kind: Kind | None) -> Callable[..., Invocation]:
    """A function with a parameter for each option of the command's groups, as Typer wants it."""

    def callback(**values: Any) -> Invocation:
        values.pop("version")
        groups = {group: group(**{f.name: values[f.name] for f in fields(group)}) for group in GROUPS[command]}
        return _invocation(command, kind, groups)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for group in GROUPS[command]
        for name, default, annotation in _parameters(group, kind)
    ]
    parameters.append(
        inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_VERSION_OPTION)
    )
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return callback


def _parameters(group: type, kind: Kind | None) -> Iterator[tuple[str, Any, Any]]:
    """Name, default and annotation of each option; the kind plain knows no -f and hides it."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        annotation = hints[field.name]
        if field.name == "files" and kind == "plain":
            annotation = Annotated[list[str] | None, typer.Option("--quantized-filename", "-f", hidden=True)]
        yield field.name, field.default, annotation


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sirocco {__version__}")
        raise typer.Exit


_VERSION_OPTION = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, metavar="", help="Print the version and exit."),
]


def _invocation(command: Command, kind: Kind | None, groups: dict[type, Any]) -> Invocation:
    if command == "doctor":
        return Invocation(command=command, as_json=groups[DoctorOptions].as_json)
    config = _config(kind, groups)
    return Invocation(command=command, config=config, chat=groups.get(ChatOptions, ChatOptions()))


def _config(kind: Kind | None, groups: dict[type, Any]) -> AppConfig:
    """The options as a configuration. Raises LaunchError naming the option at fault."""
    sections = {section: asdict(groups[group]) for group, section in _SECTIONS.items() if group in groups}
    sections["model"] |= _model(kind, groups[ModelOptions])
    engine = sections["engine"]
    engine["paged_attention"] = not engine.pop("no_paged_attn")
    if "http" in sections:
        sections["http"]["api_keys"] = sections["http"]["api_keys"] or ()
    try:
        return AppConfig.model_validate({**sections, "log": groups[LogOptions].log})
    except ValidationError as error:
        raise LaunchError(_first_fault(error)) from None


def _model(kind: Kind | None, options: ModelOptions) -> dict[str, Any]:
    """The model section's fields that the kind and -f decide."""
    files = tuple(name.strip() for given in options.files or () for name in given.split(";") if name.strip())
    if options.files and not files:
        raise LaunchError("The option -f names no file.")
    if kind == "plain" and files:
        raise LaunchError("The option -f belongs to the kind gguf; a plain model is a folder or a hub id (-m).")
    model = options.model
    if model is None and files:
        model, files = _folder_of(files)
    if model is None and kind in ("gguf", "plain"):
        raise LaunchError(f"The kind {kind} needs a model: give its hub id, folder or file with -m.")
    if model is None and options.revision:
        raise LaunchError("The option --revision belongs to a model from the hub (-m).")
    model_kind = {"gguf": "gguf", "plain": "plain"}.get(kind or "run", "gguf" if files else "auto")
    return {"model": model, "kind": model_kind, "files": files}


def _folder_of(files: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Without -m, files of one local folder: that folder and their names in it."""
    folders = {str(Path(name).expanduser().parent) for name in files}
    if len(folders) > 1:
        raise LaunchError(
            "The files given with -f lie in several folders: name the one with -m, or move them together."
        )
    return folders.pop(), tuple(Path(name).name for name in files)


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    names = {section: option_names(group) for group, section in _SECTIONS.items()}
    match fault["loc"]:
        case (str(section), str(field), *_) if section in names:
            option = names[section].get(field, (field,))[0]
            if fault["type"] == "string_pattern_mismatch":
                message = "does not have one of the forms that its help lists"
            return f"The option {option} {message}."
        case _:
            return _sentence(message)
