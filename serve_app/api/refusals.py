"""What a request may ask for and this server does not do: each is refused by name, never silently dropped."""

from serve_app.api.schema import ChatRequest, CompletionRequest, GenerationRequest
from serve_app.errors import InvalidRequest, NotImplementedHere

_TEMPLATE_OPTIONS = frozenset({"enable_thinking", "reasoning_effort"})


def refuse_in_chat(request: ChatRequest) -> None:
    """Raises NotImplementedHere for what comes later, InvalidRequest for what never will."""
    _refuse_common(request)
    for name in ("audio", "web_search_options", "session_id", "files"):
        if getattr(request, name) is not None:
            raise _later(name)
    if request.enable_shell:
        raise _later("enable_shell")
    if request.functions or request.function_call not in (None, "none", "auto"):
        raise _later("functions" if request.functions else "function_call")
    if request.modalities is not None and request.modalities != ["text"]:
        raise _later("modalities")
    if request.chat_template is not None:
        raise InvalidRequest("A request cannot bring its own chat template.", param="chat_template")
    unknown = sorted(set(request.chat_template_kwargs or ()) - _TEMPLATE_OPTIONS)
    if unknown:
        raise InvalidRequest(
            f"chat_template_kwargs takes {' and '.join(sorted(_TEMPLATE_OPTIONS))}, not {unknown[0][:100]!r}.",
            param="chat_template_kwargs",
        )


def refuse_in_completion(request: CompletionRequest) -> None:
    """Raises NotImplementedHere for what comes later, InvalidRequest for what never will."""
    _refuse_common(request)
    if request.suffix:
        raise InvalidRequest(
            "suffix is not supported: this server cannot fill in the middle of a text.", param="suffix"
        )


def _refuse_common(request: GenerationRequest) -> None:
    for name in ("grammar", "adapter", "adapters"):
        if getattr(request, name) not in (None, []):
            raise _later(name)
    if request.prompt_embeds is not None:
        raise InvalidRequest("prompt_embeds is not supported: send text or token ids.", param="prompt_embeds")
    _refuse_response_format(request.response_format)
    _refuse_tools(request)


def _refuse_response_format(value: object) -> None:
    if value is None:
        return
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("json_object", "json_schema"):
        raise NotImplementedHere(f"response_format {kind} is not implemented yet.", param="response_format")
    if kind != "text":
        raise InvalidRequest(
            "response_format must be an object whose type is text, json_object or json_schema.", param="response_format"
        )


def _refuse_tools(request: GenerationRequest) -> None:
    """Tools are taken only with tool_choice none, where they ask for nothing: calls cannot be parsed yet."""
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools.", param="tool_choice")
        return
    if choice != "none":
        raise NotImplementedHere("Tool calls are not implemented yet: send tool_choice 'none'.", param="tools")


def _later(param: str) -> NotImplementedHere:
    return NotImplementedHere(f"{param} is not implemented yet.", param=param)
