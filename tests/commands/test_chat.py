import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from rich.console import Console

from serve_app import cli
from serve_app.commands import chat
from serve_app.commands.answer import Events
from serve_app.commands.chat import Chat
from serve_app.commands.conversation import Conversation
from serve_app.engine.speculation.local_proposer import LocalProposer
from serve_app.errors import EngineFailed, QueueFull, ServeError
from serve_app.messages import Finish, GenerateRequest, TokenDelta, Usage
from serve_app.options import SamplingParams
from serve_app.text.chat_template import ChatTemplate

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


class CharTokenizer:
    """A token for each character."""

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        return [ord(char) for char in text]


class ScriptedEngine:
    """Answers on a thread of its own with what the script says, and remembers what it was asked."""

    def __init__(self, events: Events, script: Callable[["ScriptedEngine", GenerateRequest], None]) -> None:
        self.events = events
        self.script = script
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.is_aborted = threading.Event()

    def add(self, source: GenerateRequest) -> None:
        self.requests.append(source)
        threading.Thread(target=self.script, args=(self, source), daemon=True).start()

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.is_aborted.set()

    def send(self, request: GenerateRequest, text: str, finish: Finish | None = None) -> None:
        self.events.put([TokenDelta(request.request_id, 0, 0, [1] * len(text), text, finish=finish)])


def finished(reason: Any = "stop", error: ServeError | None = None) -> Finish:
    return Finish(reason, Usage(1, 1), error=error)


def says_hello(engine: ScriptedEngine, request: GenerateRequest) -> None:
    engine.send(request, "Hel")
    engine.events.put([TokenDelta("another request", 0, 0, [1], "noise")])
    engine.send(request, "lo", finished())


class Room:
    """A chat whose both ends are in the test's hands."""

    def __init__(
        self,
        script: Callable[[ScriptedEngine, GenerateRequest], None] = says_hello,
        template: str | None = TEMPLATE,
        max_prompt_tokens: int = 1000,
    ) -> None:
        events: Events = SimpleQueue()
        self.engine = ScriptedEngine(events, script)
        self.out = io.StringIO()
        self.notices = io.StringIO()
        tokenizer: Any = CharTokenizer()
        self.chat = Chat(
            engine=self.engine,
            events=events,
            conversation=Conversation(tokenizer, ChatTemplate(template) if template else None, max_prompt_tokens),
            defaults=SamplingParams(temperature=0.8),
            overrides={},
            notices=Console(file=self.notices, width=200),
            out=self.out,
        )

    def say(self, *lines: str) -> None:
        self.chat.talk(iter(lines))

    def prompt(self, index: int = -1) -> str:
        return "".join(map(chr, self.engine.requests[index].prompt_ids))


def test_answers_are_streamed_and_remembered() -> None:
    room = Room()
    room.say("hi", "", "again")
    assert room.out.getvalue() == "Hello\nHello\n"
    assert room.prompt(0) == "<user>hi<assistant>"
    assert room.prompt(1) == "<user>hi<assistant>Hello<user>again<assistant>"
    assert room.engine.requests[0].request_id != room.engine.requests[1].request_id


def test_commands_change_the_conversation() -> None:
    room = Room()
    room.say("hi", "/system be brief", "one", "/clear", "two", "/system", "three", "/exit", "never asked")
    assert [room.prompt(i) for i in range(4)] == [
        "<user>hi<assistant>",
        "<system>be brief<user>one<assistant>",
        "<system>be brief<user>two<assistant>",
        "<user>three<assistant>",
    ]


def test_commands_change_the_sampling_and_take_it_back() -> None:
    room = Room()
    room.say("/temperature 0", "/topk 5", "/topp 0.5", "a", "/temperature", "b")
    first, second = (request.sampling for request in room.engine.requests)
    assert (first.temperature, first.top_k, first.top_p) == (0.0, 5, 0.5)
    assert isinstance(first.top_k, int)
    assert (second.temperature, second.top_k) == (0.8, 5)
    assert "temperature is 0.8." in room.notices.getvalue()


@pytest.mark.parametrize("line", ["/temperature hot", "/temperature -1", "/topp 2", "/topk 1.5", "/topp nan"])
def test_bad_values_are_refused(line: str) -> None:
    room = Room()
    room.say(line)
    assert " is a number from 0 to " in room.notices.getvalue()
    assert room.chat.overrides == {}


def test_help_and_unknown_commands() -> None:
    room = Room()
    room.say("/help", "/jump")
    for name in chat.COMMANDS:
        assert f"/{name}" in room.notices.getvalue()
    assert "no command /jump" in room.notices.getvalue()
    assert room.out.getvalue() == ""


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    def talks_until_aborted(engine: ScriptedEngine, request: GenerateRequest) -> None:
        engine.send(request, "On and")
        if len(engine.requests) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert engine.is_aborted.wait(20)
            engine.send(request, "", finished("abort"))
        else:
            engine.send(request, " off", finished())

    before = signal.getsignal(signal.SIGINT)
    room = Room(talks_until_aborted)
    room.say("hi", "more")
    assert room.out.getvalue() == "On and\nOn and off\n"
    assert room.engine.aborted == [room.engine.requests[0].request_id]
    assert "stopped" in room.notices.getvalue()
    assert room.prompt() == "<user>hi<assistant>On and<user>more<assistant>"
    assert signal.getsignal(signal.SIGINT) is before


def test_errors_are_told_and_the_conversation_goes_on() -> None:
    def fails_once(engine: ScriptedEngine, request: GenerateRequest) -> None:
        if len(engine.requests) == 1:
            engine.send(request, "Hm", finished("error", EngineFailed("the engine failed in a step")))
        else:
            says_hello(engine, request)

    room = Room(fails_once)
    room.say("hi", "again")
    assert "the engine failed in a step" in room.notices.getvalue()
    assert room.prompt() == "<user>again<assistant>"


def test_a_refused_request_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: GenerateRequest) -> None:
        raise QueueFull("too many")

    room = Room()
    monkeypatch.setattr(room.engine, "add", refuse)
    room.say("hi")
    assert "(too many)" in room.notices.getvalue()


def test_old_exchanges_are_forgotten_when_the_context_is_full() -> None:
    room = Room(max_prompt_tokens=60)
    room.say("first", "second", "third", "x" * 100)
    assert room.prompt() == "<user>second<assistant>Hello<user>third<assistant>"
    assert "(the 1 oldest exchanges no longer fit" in room.notices.getvalue()
    assert "60 at most" in room.notices.getvalue()


def test_without_a_template_the_model_continues_the_text() -> None:
    room = Room(template=None)
    room.say("Once", "upon")
    assert (room.prompt(0), room.prompt(1)) == ("Once", "upon")


def test_lines_of_a_pipe_and_their_continuation() -> None:
    lines = chat.questions(io.StringIO("one\ntwo \\\nand more\nlast"), Console(file=io.StringIO()))
    assert list(lines) == ["one", "two \nand more", "last"]


MODELS = Path(__file__).parents[1] / "data" / "models"


def test_the_embedded_model_talks_through_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serve_app", "chat", "--temperature", "0", "--max-tokens", "16"],
        input="Once upon a time\n/exit\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(", there was a little girl named Lily.")
    assert done.stderr.splitlines() == []


def test_a_draft_model_is_asked_and_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, draft = (str(MODELS / name / "hf") for name in ("stories260K", "stories40K-draft"))
    num_drafted = 0
    propose = LocalProposer.propose

    def spy(self: LocalProposer, wishes: Any, *rest: Any) -> Any:
        nonlocal num_drafted
        drafts = propose(self, wishes, *rest)
        num_drafted += sum(map(len, drafts))
        return drafts

    monkeypatch.setattr(LocalProposer, "propose", spy)
    said = []
    for options in (["speculative", "-d", draft, "--fixed-draft-tokens"], []):
        invocation = cli.parse(["chat", "--temperature", "0", "--max-tokens", "16", "-m", model, *options])
        assert invocation is not None
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n"))
        assert chat.run(invocation.config, invocation.chat) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    assert num_drafted > 5


def test_a_model_that_is_not_there_ends_with_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serve_app", "chat", "--offline", "-m", "/no/such/model"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("sirocco: ")
