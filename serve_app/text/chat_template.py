"""A conversation to one text, by the Jinja template that comes with a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from jinja2 import Template, TemplateError, nodes

from serve_app.errors import InvalidRequest, ModelFileError
from serve_app.text.template_environment import TemplateEnvironment
from serve_app.text.template_files import DEFAULT, templates_of_folder, templates_of_gguf, templates_of_options
from serve_app.text.template_limits import Budget, current_budget
from serve_app.text.tokenizer import Tokenizer

_TOOL_USE: Final = "tool_use"
_MAX_SOURCE_CHARS: Final = 1 << 20
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
        sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        if not sources:
            raise ModelFileError(f"{origin}: has no chat template")
        self.origin = origin
        self.source = sources.get(DEFAULT, next(iter(sources.values())))
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
        variant = self._variants.get(DEFAULT)
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

    1. jinja_explicit (-j). 2. chat_template (-c). 3. The model's files in folder. 4. GGUF metadata; for all of them see
    template_files. None means that chat needs one of the first two; completions do not. Raises ModelFileError for one
    that is there but broken.
    """
    found = (
        templates_of_options(jinja_explicit, chat_template)
        or (None if folder is None else templates_of_folder(folder))
        or templates_of_gguf(gguf_metadata or {})
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
