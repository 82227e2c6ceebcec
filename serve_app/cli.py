"""argv → Invocation: each mistake is a LaunchError with one sentence. The grammar is in cli_grammar.py."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from serve_app import __version__
from serve_app.cli_config import configuration
from serve_app.cli_grammar import COMMANDS, GROUPS, KINDS, WITHOUT, Command, Kind, take_apart
from serve_app.cli_options import (
    ChatLogOptions,
    ChatOptions,
    DoctorOptions,
    LogOptions,
    ModelOptions,
)
from serve_app.cli_quant_options import QualityOptions, QuantizeOptions
from serve_app.config import AppConfig
from serve_app.errors import LaunchError

ABOUT: dict[Command, str] = {
    "serve": "Serve a model over OpenAI's HTTP API.",
    "chat": "Talk to a model in this terminal, on the same engine, without a server.",
    "config": "Print the Serve config file for the same arguments as serve, ready for `serve deploy`.",
    "doctor": "Print what was found on this machine, and what of it is used.",
    "quantize": "Write a model's files in other types: a GGUF, or a folder of SafeTensors.",
    "quality": "Measure what quantisation costs a model: perplexity, KL divergence and agreement by type.",
}

KIND_ABOUT: dict[Kind, str] = {
    "gguf": "The model is a GGUF file: -m names its folder, repository or the file itself, -f the file in it.",
    "ggml": "The model is a Llama in GGML's container from before GGUF (2023): -m and -f as for gguf.",
    "plain": "The model is a folder or repository with SafeTensors and config.json.",
    "run": "The model's kind is found out from its files.",
    "speculative": "A draft model (-d) proposes tokens, the model (-m) verifies them: the same text, sooner. A kind "
    "that follows is the model's; the draft model's is --draft-kind.",
    "toml": "The models are those of a file in mistral.rs's form (-f), with [model] and [speculative].",
}

OVERVIEW = """Commands: [bold]serve[/] (when none is given), [bold]chat[/] in this terminal, [bold]config[/] for \
`serve deploy`, [bold]doctor[/] for this machine, [bold]quantize[/] for \
models in fewer bits, [bold]quality[/] for what that costs.

Kinds: [bold]gguf[/], [bold]ggml[/] (before GGUF), [bold]plain[/] (SafeTensors), [bold]run[/] (found out by itself), \
[bold]speculative[/] (with a draft model), [bold]toml[/] (as a file says). `sirocco COMMAND KIND --help` explains each.

Without a kind and a model, a tiny storyteller that comes with Sirocco is served."""


# Typer's own copy of click in new versions, click itself in older ones.
_USAGE_ERRORS: Any = typer.BadParameter.__mro__[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """What the command line asks for. chat, quantize and quality are set for the commands of that name."""

    command: Command
    config: AppConfig = field(default_factory=AppConfig)
    chat: ChatOptions = field(default_factory=ChatOptions)
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    quality: QualityOptions = field(default_factory=QualityOptions)
    as_json: bool = False
    lists_models: bool = False


def parse(argv: Sequence[str]) -> Invocation | None:
    """What argv (without the program's name) asks for; None when it was answered here (--help, --version).

    Raises LaunchError with one sentence.
    """
    words = take_apart(argv)
    name = words.command or "serve"
    command = _click_command(name, words.kind, words.is_speculative)
    program = "sirocco " + (words.command or f"[{'|'.join(COMMANDS)}]")
    try:
        result = command.main(words.options, prog_name=program, standalone_mode=False)
    except Exception as error:
        if not isinstance(error, _USAGE_ERRORS):
            raise
        raise LaunchError(f"{_sentence(error.format_message())} See sirocco {name} --help.") from error
    return result if isinstance(result, Invocation) else None


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


def _click_command(command: Command, kind: Kind | None, is_speculative: bool) -> Any:
    """The Typer command for one command and kind; only this one is built, since building them all takes longer."""
    shown: list[Kind] = ["speculative"] if is_speculative else []
    if kind is not None:
        shown.append(kind)
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    about = " ".join([ABOUT[command], *(KIND_ABOUT[word] for word in shown)])
    words = "" if command == "doctor" else f" {' '.join(shown) or '[' + '|'.join(KINDS) + ']'} [OPTIONS]"
    app.command(
        command,
        cls=_Command,
        help=about if shown or command == "doctor" else f"{about}\n\n{OVERVIEW}",
        options_metavar=f"[OPTIONS]{words}",
        context_settings={"help_option_names": ["--help", "-h"]},
    )(_callback(command, kind, is_speculative))
    return typer.main.get_command(app)


def _callback(command: Command, kind: Kind | None, is_speculative: bool) -> Callable[..., Invocation]:
    """A function with a parameter for each option of the command's groups, as Typer wants it."""

    def callback(**values: Any) -> Invocation:
        values.pop("version")
        groups = {
            group: group(
                **{f.name: values[name] for f in fields(group) if (name := _parameter_name(group, f.name)) in values}
            )
            for group in GROUPS[command]
        }
        return _invocation(command, kind, is_speculative, groups)

    parameters = [
        inspect.Parameter(
            _parameter_name(group, name), inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for group in GROUPS[command]
        for name, default, annotation in _parameters(group, kind)
        if (group, name) not in WITHOUT.get(command, {})
    ]
    parameters.append(
        inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_VERSION_OPTION)
    )
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return callback


def _parameter_name(group: type, name: str) -> str:
    """Of an option: two groups may have fields of one name."""
    return f"{group.__name__}_{name}"


def _parameters(group: type, kind: Kind | None) -> Iterator[tuple[str, Any, Any]]:
    """Name, default and annotation of each option; a kind hides those that belong to others."""
    hints = get_type_hints(group, include_extras=True)
    for option in fields(group):
        annotation = hints[option.name]
        if option.name == "files" and group is ModelOptions and kind == "plain":
            annotation = Annotated[list[str] | None, typer.Option("--quantized-filename", "-f", hidden=True)]
        if option.name == "gqa" and group is ModelOptions and kind in ("gguf", "plain"):
            annotation = Annotated[int | None, typer.Option("--gqa", "-g", hidden=True)]
        if option.name == "model" and group is ModelOptions and kind == "toml":
            annotation = Annotated[str | None, typer.Option("--model-id", "-m", hidden=True)]
        if option.name == "files" and group is ModelOptions and kind == "toml":
            annotation = Annotated[list[str] | None, _SELECTOR_OPTION]
        yield option.name, option.default, annotation


_SELECTOR_OPTION = typer.Option(
    "--quantized-filename", "-f", help="TOML file that names the models.", metavar="FILE", rich_help_panel="Model"
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sirocco {__version__}")
        raise typer.Exit


_VERSION_OPTION = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, metavar="", help="Print the version and exit."),
]


def _invocation(command: Command, kind: Kind | None, is_speculative: bool, groups: dict[type, Any]) -> Invocation:
    if command == "doctor":
        doctor = groups[DoctorOptions]
        return Invocation(command=command, as_json=doctor.as_json, lists_models=doctor.models)
    log = groups[ChatLogOptions if ChatLogOptions in groups else LogOptions].log
    config = configuration(kind, is_speculative, groups, log)
    chat = groups.get(ChatOptions, ChatOptions())
    quantize = groups.get(QuantizeOptions, QuantizeOptions())
    quality = groups.get(QualityOptions, QualityOptions())
    return Invocation(command=command, config=config, chat=chat, quantize=quantize, quality=quality)
