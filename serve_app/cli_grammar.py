"""The grammar of the command line: `sirocco [COMMAND] [OPTIONS] [KIND] [OPTIONS]`.

COMMAND is serve (also when left out), chat, config, doctor, quantize or quality; KIND is gguf, ggml, plain, run, toml,
or speculative, which the kind of the model that verifies may follow. Options stand before or after the kind, as users
of mistralrs-server write them, so that the words have to be found among options and values.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from serve_app.cli_draft_options import DraftOptions, SpeculativeOptions
from serve_app.cli_isq_options import InSituOptions
from serve_app.cli_options import (
    ChatLogOptions,
    ChatOptions,
    DoctorOptions,
    EngineOptions,
    LogOptions,
    ModelOptions,
)
from serve_app.cli_quant_options import QualityOptions, QuantizeOptions
from serve_app.cli_server_options import DeploymentOptions, HttpOptions
from serve_app.errors import LaunchError

Command = Literal["serve", "chat", "config", "doctor", "quantize", "quality"]
Kind = Literal["gguf", "ggml", "plain", "run", "speculative", "toml"]

COMMANDS: tuple[Command, ...] = get_args(Command)
KINDS: tuple[Kind, ...] = get_args(Kind)
_SERVED = f"{', '.join(KINDS[:-1])} and {KINDS[-1]}"

# Kinds that the seed's and mistral.rs's users know, and that this version does not serve.
LATER_KINDS = (
    "diffusion",
    "embedding",
    "lora",
    "lora-ggml",
    "lora-gguf",
    "lora-plain",
    "multimodal-plain",
    "speech",
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
    "--draft-model": "--draft-model-id",
    "--draft-filename": "--draft-file",
}

_SERVER = (
    ModelOptions,
    InSituOptions,
    SpeculativeOptions,
    DraftOptions,
    EngineOptions,
    HttpOptions,
    DeploymentOptions,
    LogOptions,
)
GROUPS: dict[Command, tuple[type, ...]] = {
    "serve": _SERVER,
    "config": _SERVER,
    "chat": (
        ModelOptions,
        InSituOptions,
        SpeculativeOptions,
        DraftOptions,
        EngineOptions,
        ChatOptions,
        ChatLogOptions,
    ),
    "doctor": (DoctorOptions,),
    "quantize": (ModelOptions, QuantizeOptions, LogOptions),
    "quality": (ModelOptions, EngineOptions, QualityOptions, ChatLogOptions),
}


# Options of a command's groups that it does not have, and why: group and field → sentence.
WITHOUT: dict[Command, dict[tuple[type, str], str]] = {
    "quantize": {
        (ModelOptions, "dtype"): "the weights are read as they are, and --isq says what they become",
        (ModelOptions, "max_seq_len"): "the file keeps the length that the model was made for",
    },
    "chat": {
        (SpeculativeOptions, "deadline_ms"): "draft model and model take turns in one process",
    },
}


@dataclass(frozen=True, slots=True)
class Words:
    """A command line taken apart: the two words, and the options in their order.

    kind: the model's own; is_speculative: the word speculative stands before it, or alone.
    """

    command: Command | None
    kind: Kind | None
    options: list[str]
    is_speculative: bool = False


def take_apart(argv: Sequence[str]) -> Words:
    """Finds command and kind among the options: options may stand on both sides of either."""
    # --json is a flag of one command and takes a value in another; no other word decides what an option is.
    takes_value = _known_options(next((word for word in argv if word in COMMANDS), None))
    command: Command | None = None
    kind: Kind | None = None
    is_speculative = False
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
        elif word in COMMANDS and command is None and kind is None and not is_speculative:
            command = word
        elif word == "speculative" and kind is None and not is_speculative:
            is_speculative = True
        elif word != "speculative" and word in KINDS and kind is None:
            kind = word
        elif word in LATER_KINDS:
            raise LaunchError(f"The model kind {word} is not part of this version, which serves {_SERVED}.")
        else:
            raise LaunchError(_unexpected(word, kind or ("speculative" if is_speculative else None)))
    for (group, option), why in WITHOUT.get(command or "serve", {}).items():
        given = next((name for name in option_names(group)[option] if name in options), None)
        if given is not None:
            raise LaunchError(f"The command {command} does not have {given}: {why}.")
    if command == "doctor" and (kind is not None or is_speculative):
        raise LaunchError(
            f"The command doctor looks at the machine, not at a model: leave out {kind or 'speculative'}."
        )
    if is_speculative and SpeculativeOptions not in GROUPS[command or "serve"]:
        raise LaunchError(f"The command {command} uses no draft model: leave out speculative.")
    return Words(command, kind, options, is_speculative)


def _known_options(command: str | None) -> dict[str, bool]:
    """Every option name of every command → whether a value follows; command's own meaning where they differ."""
    known = {"--help": False, "-h": False, "--version": False}
    own = next((groups for name, groups in GROUPS.items() if name == command), ())
    for group in [*(group for groups in GROUPS.values() for group in groups), *own]:
        hints = get_type_hints(group)
        for option, names in option_names(group).items():
            known.update(dict.fromkeys(names, hints[option] is not bool))
    return known


def _value_of(name: str, rest: Iterator[str]) -> str:
    value = next(rest, None)
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


def option_names(group: type) -> dict[str, tuple[str, ...]]:
    """Field → option names of one group, e.g. port → ('--port', '-p')."""
    hints = get_type_hints(group, include_extras=True)
    names = {}
    for option in fields(group):
        info = hints[option.name].__metadata__[0]
        names[option.name] = (info.default, *(info.param_decls or ()))
    return names
