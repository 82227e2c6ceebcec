"""`sirocco chat`: a conversation in the terminal, on the engine without Ray. Also reads questions from a pipe."""

import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TextIO

from rich.console import Console

from serve_app.cli_options import ChatOptions
from serve_app.commands.answer import Answer, AnsweringEngine, Events, on_interrupt, stream
from serve_app.commands.conversation import Conversation
from serve_app.commands.progress import loading
from serve_app.config import AppConfig
from serve_app.errors import ServeError
from serve_app.messages import GenerateRequest
from serve_app.options import SamplingParams

PROMPT = "> "


def run(config: AppConfig, options: ChatOptions) -> int:
    """Loads the model and talks until /exit or the end of the input."""
    from serve_app.engine.speculation.local_engine import local_engine
    from serve_app.loaders.model_files import resolve
    from serve_app.text.chat_template import open_chat_template

    notices = Console(stderr=True, highlight=False, markup=False)
    files = resolve(config.model.to_source())
    speculation = config.speculation
    draft = None if speculation.draft is None else resolve(speculation.draft.to_source())
    events: Events = SimpleQueue()
    with ExitStack() as stack:
        with loading(notices, files.model_name, quantises=files.isq is not None) as progress:
            engine = stack.enter_context(
                local_engine(
                    files,
                    config.engine.to_config(),
                    events.put,
                    speculation.to_options(),
                    draft,
                    progress=progress,
                )
            )
        tokenizer = engine.parts.tokenizer
        template = open_chat_template(files, tokenizer)
        engine.start()
        chat = Chat(
            engine=engine,
            events=events,
            conversation=Conversation(tokenizer, template, files.max_seq_len - 1, options.system),
            defaults=files.sampling_defaults(),
            overrides=_overrides(options),
            notices=notices,
        )
        chat.greet(files.model_name)
        # In a terminal Ctrl-C never ends the program, also when it comes between an answer and the next question.
        with on_interrupt(signal.SIG_IGN) if sys.stdin.isatty() else nullcontext():
            chat.talk(questions(sys.stdin, notices))
    return 0


def _overrides(options: ChatOptions) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "max_tokens")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def questions(source: TextIO, notices: Console) -> Iterator[str]:
    """The lines that the user types, or those of a pipe. A backslash at a line's end continues it."""
    is_terminal = source.isatty()
    if is_terminal:
        # Gives input() a history and an editor.
        import readline  # noqa: F401
    parts: list[str] = []
    while True:
        try:
            line = _ask("… " if parts else PROMPT) if is_terminal else _next_line(source)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            parts.clear()
            notices.print("\n/exit or Ctrl-D ends the conversation.", style="dim")
            continue
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts.clear()


def _ask(prompt: str) -> str:
    with on_interrupt(signal.default_int_handler):
        return input(prompt)


def _next_line(source: TextIO) -> str:
    line = source.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


@dataclass(slots=True, kw_only=True)
class Chat:
    """The conversation's loop: questions in, answers to out, everything else to notices."""

    engine: AnsweringEngine
    events: Events
    conversation: Conversation
    defaults: SamplingParams
    overrides: dict[str, Any]
    notices: Console
    out: TextIO = field(default_factory=lambda: sys.stdout)
    is_over: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def greet(self, model_name: str) -> None:
        """Says, in a terminal, who is talking."""
        if not self.notices.is_terminal:
            return
        kind = "" if self.conversation.template else " It has no chat template: it continues your text."
        self.notices.print(f"{model_name} is ready.{kind} /help lists the commands.", style="dim")

    def talk(self, lines: Iterator[str]) -> None:
        """Answers each line until there are no more, or one says /exit."""
        for line in lines:
            if line.startswith("/"):
                self.obey(line)
            elif line.strip():
                self.answer(line)
            if self.is_over:
                return

    def answer(self, question: str) -> None:
        """Streams the model's answer; what it said before a Ctrl-C counts as its answer."""
        answer = Answer()
        try:
            ids, num_forgotten = self.conversation.prompt_ids(question)
            if num_forgotten:
                self.notices.print(
                    f"(the {num_forgotten} oldest exchanges no longer fit and are forgotten)", style="dim"
                )
            request = GenerateRequest(f"chat-{next(self._numbers)}", ids, self.defaults.with_overrides(self.overrides))
            for text in stream(self.engine, self.events, request, answer):
                self.out.write(text)
                self.out.flush()
        except ServeError as error:
            answer.error = error
        self.out.write("\n")
        self.out.flush()
        if answer.error is not None:
            self.notices.print(f"({answer.error})", style="red")
            return
        self.conversation.exchanges.append((question, answer.text))
        self._report(answer)

    def _report(self, answer: Answer) -> None:
        if answer.was_stopped:
            self.notices.print("(stopped)", style="dim")
        elif self.notices.is_terminal and answer.seconds > 0:
            rate = answer.num_tokens / answer.seconds
            self.notices.print(f"({answer.num_tokens} tokens, {rate:.1f} a second)", style="dim")

    def obey(self, line: str) -> None:
        """Runs a command such as '/temperature 0.7'."""
        name, _, rest = line[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            self.notices.print(f"There is no command /{name}; /help lists them.", style="red")
            return
        command.action(self, rest.strip())

    def show_help(self, _: str) -> None:
        for name, command in COMMANDS.items():
            self.notices.print(f"  /{name + ' ' + command.argument:<16} {command.help}", soft_wrap=True)
        self.notices.print(
            "  A setting without a value goes back to the model's own. Ctrl-C stops an answer.", soft_wrap=True
        )
        self.notices.print("  A line that ends with \\ goes on in the next.", soft_wrap=True)

    def clear(self, _: str) -> None:
        self.conversation.exchanges.clear()
        self.notices.print("The conversation starts anew.", style="dim")

    def set_system(self, text: str) -> None:
        self.conversation.system = text or None
        self.clear("")

    def exit(self, _: str) -> None:
        self.is_over = True

    def set_parameter(self, name: str, kind: Callable[[str], float], low: float, high: float, text: str) -> None:
        """Sets a sampling parameter, takes it back to the model's own without a value, and says what holds."""
        if not text:
            self.overrides.pop(name, None)
        else:
            try:
                value = kind(text)
            except ValueError:
                value = low - 1
            if not low <= value <= high:
                self.notices.print(f"{name} is a number from {low:g} to {high:g}.", style="red")
                return
            self.overrides[name] = value
        self.notices.print(f"{name} is {getattr(self.defaults.with_overrides(self.overrides), name):g}.", style="dim")


@dataclass(frozen=True, slots=True)
class Command:
    """A word after a slash."""

    action: Callable[[Chat, str], None]
    help: str
    argument: str = ""


def _parameter(name: str, kind: Callable[[str], float], low: float, high: float) -> Callable[[Chat, str], None]:
    return lambda chat, text: chat.set_parameter(name, kind, low, high, text)


COMMANDS: dict[str, Command] = {
    "help": Command(Chat.show_help, "lists the commands"),
    "clear": Command(Chat.clear, "forgets the conversation"),
    "system": Command(Chat.set_system, "sets the system message and starts anew; without text there is none", "TEXT"),
    "temperature": Command(_parameter("temperature", float, 0, 100), "0: always the likeliest token", "X"),
    "topk": Command(_parameter("top_k", int, 0, 2**31), "draws from the k likeliest tokens; 0: all", "K"),
    "topp": Command(_parameter("top_p", float, 0, 1), "draws from the likeliest that make up this probability", "P"),
    "exit": Command(Chat.exit, "ends the conversation, as does Ctrl-D"),
}
