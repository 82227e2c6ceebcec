"""A conversation to one text, by the Jinja template that comes with a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from jinja2 import Template, TemplateError, nodes

from serve_app.errors import InvalidRequest, ModelFileError
from serve_app.text.template_environment import TemplateEnvironment
from serve_app.text.template_limits import Budget, current_budget
from serve_app.text.tokenizer import Tokenizer
from serve_app.text.tokenizer_files import read_json

_DEFAULT: Final = "default"
_TOOL_USE: Final = "tool_use"
_MAX_SOURCE_CHARS: Final = 1 << 20
_GGUF_KEY: Final = "tokenizer.chat_template"
# What rendering can raise for a template that does not fit the conversation, or is malicious.
_RENDER_ERRORS: Final = (
    TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError
)  # fmt: skip
_COMPILE_ERRORS: Final = (TemplateError, MemoryError, RecursionError, SyntaxError, ValueError)


class ChatTemplate:
    """A compiled template, or several by name: "default", and "tool_use" for requests with tools.

    bos, eos: the texts of the model's tokens. tokens: more of them for the template, as "unk_token". origin: where
    the source comes from, for messages. Raises ModelFileError for a source that does not compile.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        bos: str = "",
        eos: str = "",
        tokens: Mapping[str, str] | None = None,
        origin: str = "chat template",
    ) -> None:
        sources = {_DEFAULT: source} if isinstance(source, str) else dict(source)
        if not sources:
            raise ModelFileError(f"{origin}: has no chat template")
        self.origin = origin
        self.source = sources.get(_DEFAULT, next(iter(sources.values())))
        self._tokens = {**(tokens or {}), "bos_token": bos, "eos_token": eos}
        self._variants = {name: _Variant(text, origin) for name, text in sources.items()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The prompt's text; encode it with parse_special=True.

        options are the request's own variables for the template (enable_thinking …). Content given as a list of text
        parts is joined for templates that know only strings. Raises InvalidRequest when the template refuses the
        conversation, does not fit it, or costs too much.
        """
        variant = self._variants.get(_DEFAULT)
        if variant is None or (tools and _TOOL_USE in self._variants):
            variant = self._variants.get(_TOOL_USE) or next(iter(self._variants.values()))
        if not variant.takes_parts:
            messages = [_with_text_content(m) for m in messages]
        values = {**self._tokens, "documents": None, **options}
        values |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            try:
                return variant.render(values)
            except TypeError:
                if tools is not None:
                    raise
                # Some templates for tool use go through the tools without asking whether there are any.
                return variant.render({**values, "tools": []})
        except _RENDER_ERRORS as error:
            sentence = str(error) or type(error).__name__
            raise InvalidRequest(
                f"The chat template cannot be applied to these messages: {sentence[:500]}", param="messages"
            ) from None


class _Variant:
    def __init__(self, source: str, origin: str) -> None:
        if len(source) > _MAX_SOURCE_CHARS:
            raise ModelFileError(f"{origin}: the chat template is over {_MAX_SOURCE_CHARS} characters long")
        environment = TemplateEnvironment()
        try:
            parsed = environment.parse(source)
            self._template: Template = environment.from_string(source)
            self.takes_parts = _takes_parts(parsed)
        except _COMPILE_ERRORS as error:
            raise ModelFileError(f"{origin}: the chat template does not compile ({error})") from None

    def render(self, values: Mapping[str, Any]) -> str:
        before = current_budget.set(Budget())
        try:
            return self._template.render(values)
        finally:
            current_budget.reset(before)


def _takes_parts(template: nodes.Template) -> bool:
    """True for templates that go through the parts of a message's content themselves."""
    return any(_is_content(loop.iter) for loop in template.find_all(nodes.For))


def _is_content(node: nodes.Node) -> bool:
    """message['content'], message.content, or a variable called content, perhaps filtered."""
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _is_content(node.node)
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name == "content"


def _with_text_content(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise InvalidRequest("This model takes only text as the content of a message.", param="messages")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def choose_template(
    *,
    jinja_explicit: str | None = None,
    chat_template: str | None = None,
    folder: Path | None = None,
    gguf_metadata: Mapping[str, Any] | None = None,
    bos: str = "",
    eos: str = "",
    tokens: Mapping[str, str] | None = None,
) -> ChatTemplate | None:
    """The template to use, the first that is there, in the order that mistral.rs documents.

    1. jinja_explicit (-j): a file that holds Jinja. 2. chat_template (-c): a .json file with a "chat_template", a file
    that holds Jinja, or Jinja itself. 3. The model's files in folder: chat_template.jinja, the "chat_template" of
    tokenizer_config.json (a text, or a list of {name, template}), of chat_template.json. 4. GGUF metadata. None means
    that chat needs one of the first two; completions do not. Raises ModelFileError for one that is there but broken.
    """
    found = (
        _from_option(jinja_explicit, literal_allowed=False)
        or _from_option(chat_template, literal_allowed=True)
        or _from_folder(folder)
        or _from_gguf(gguf_metadata)
    )
    if found is None:
        return None
    origin, sources = found
    return ChatTemplate(sources, bos=bos, eos=eos, tokens=tokens, origin=origin)


class TemplateSources(Protocol):
    """Where a model's template may be; loaders.model_files.ModelFiles fulfils it. See choose_template."""

    @property
    def jinja_explicit(self) -> str | None: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def folder(self) -> Path: ...
    @property
    def gguf_metadata(self) -> dict[str, Any] | None: ...


def open_chat_template(files: TemplateSources, tokenizer: Tokenizer) -> ChatTemplate | None:
    """choose_template for a model's files. bos_token and eos_token are the tokenizer's own: generation_config may name
    further end tokens, and templates do not mean those.
    """
    return choose_template(
        jinja_explicit=files.jinja_explicit,
        chat_template=files.chat_template,
        folder=files.folder,
        gguf_metadata=files.gguf_metadata,
        bos="" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
        eos="" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id),
    )


_Found = tuple[str, dict[str, str]]


def _from_option(value: str | None, *, literal_allowed: bool) -> _Found | None:
    if not value:
        return None
    if literal_allowed and ("{{" in value or "{%" in value):
        return "--chat-template", {_DEFAULT: value}
    path = Path(value)
    if path.suffix == ".json":
        found = _from_json(path)
        if found is None:
            raise ModelFileError(f'{path}: has no "chat_template"')
        return found
    return str(path), {_DEFAULT: _read_text(path)}


def _from_folder(folder: Path | None) -> _Found | None:
    if folder is None:
        return None
    path = folder / "chat_template.jinja"
    if path.is_file():
        sources = {_DEFAULT: _read_text(path)}
        for more in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            sources[more.stem] = _read_text(more)
        return str(path), sources
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _from_json(folder / name) if (folder / name).is_file() else None
        if found is not None:
            return found
    return None


def _from_json(path: Path) -> _Found | None:
    content = read_json(path)
    value = content.get("chat_template") if isinstance(content, dict) else None
    if value is None:
        return None
    if isinstance(value, list):
        try:
            value = {entry["name"]: entry["template"] for entry in value}
        except (TypeError, KeyError):
            raise ModelFileError(f'{path}: the list "chat_template" needs name and template in each entry') from None
    sources = {_DEFAULT: value} if isinstance(value, str) else value
    if not isinstance(sources, dict) or not all(isinstance(t, str) for t in sources.values()) or not sources:
        raise ModelFileError(f'{path}: "chat_template" is neither a text nor a list of them')
    return str(path), sources


def _from_gguf(metadata: Mapping[str, Any] | None) -> _Found | None:
    sources: dict[str, str] = {}
    for key, value in (metadata or {}).items():
        if key == _GGUF_KEY or key.startswith(_GGUF_KEY + "."):
            if not isinstance(value, str):
                raise ModelFileError(f"the GGUF metadata: key {key} is no string")
            sources[key.removeprefix(_GGUF_KEY).removeprefix(".") or _DEFAULT] = value
    return ("the GGUF metadata", sources) if sources else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ModelFileError(f"{path}: is not UTF-8") from None
