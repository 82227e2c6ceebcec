"""The requests of the OpenAI API, with mistral.rs's extension fields, as pydantic models; unknown ones are ignored."""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from serve_app.errors import InvalidRequest
from serve_app.options import MAX_DRAFT_TOKENS

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
Effort = Literal["off", "none", "minimal", "low", "medium", "high", "xhigh"]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = list[TokenId]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
# The keys of a JSON object are strings.
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]

_EXPECTED = {
    "prompt": "a string, an array of strings, an array of token ids or an array of such arrays",
    "stop": "a non-empty string or an array of non-empty strings",
    "messages": "an array of messages or a string",
    "content": "a string, an array of content parts, or null next to tool_calls",
    "isq_type": "the name of a type, or a width in bits",
    "ggml_type": "the name of a type, or a width in bits",
    "logit_bias": "an object of token ids (as strings) and biases from -100 to 100",
    "speculative": "an object with enabled or max_tokens",
    "speculative.enabled": "true or false",
    "speculative.max_tokens": f"a whole number from 0 (off) to {MAX_DRAFT_TOKENS}",
}

# Objects whose own fields are told of; of the others only what they may be.
_NESTED = ("messages", "speculative")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_messages(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _without_empty(value: list[str] | None) -> list[str] | None:
    if value is not None and not all(value):
        raise ValueError("empty string")
    return value


Strings = Annotated[list[str] | None, BeforeValidator(_as_list), AfterValidator(_without_empty)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Body):
    include_usage: bool | None = None


class Message(_Body):
    """One message of a conversation; which content parts are taken is decided in convert."""

    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _alias(cls, value: Any) -> Any:
        if isinstance(value, dict) and "reasoning" in value and "reasoning_content" not in value:
            return {**value, "reasoning_content": value["reasoning"]}
        return value


class Speculative(_Body):
    """What a request wants of speculation: none of it, or at most max_tokens drafted tokens a step, 0 being none."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | None = None


class GenerationRequest(_Body):
    """What both generation endpoints take. None: not given; the model's generation_config decides."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Strings = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenKey, Bias] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    user: str | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    dry_multiplier: Annotated[float, Field(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Field(gt=0, le=100)] | None = None
    dry_allowed_length: NonNegative | None = None
    dry_sequence_breakers: list[str] | None = None
    truncate_sequence: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: NonNegative | None = None
    stop_token_ids: TokenIds | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    speculative: Speculative | None = None

    grammar: Any = None
    adapter: Any = None
    adapters: Any = None
    response_format: Any = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    prompt_embeds: Any = None

    @model_validator(mode="before")
    @classmethod
    def _newer_name(cls, value: Any) -> Any:
        """max_completion_tokens is max_tokens' newer name, and wins where both are given."""
        if isinstance(value, dict) and value.get("max_completion_tokens") is not None:
            return {**value, "max_tokens": value["max_completion_tokens"]}
        return value


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], BeforeValidator(_as_messages), Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None
    web_search_options: Any = None
    session_id: Any = None
    files: Any = None
    enable_shell: bool | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | TokenIds | list[TokenIds]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt, each a text or token ids."""
        prompt: Any = self.prompt
        is_single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if is_single else list(prompt)


class IsqRequest(_Body):
    """POST /v1/re_isq. isq_type: a type, a mix or a width in bits; ggml_type: mistral.rs's name of it."""

    isq_type: str | int | None = None
    ggml_type: str | int | None = None
    mode: Literal["drain", "swap"] = "drain"
    target: Literal["target", "draft"] = "target"


RequestT = TypeVar("RequestT", bound=_Body)


def parse_request(model: type[RequestT], fields: dict[str, Any]) -> RequestT:
    """The checked request. Raises InvalidRequest naming the first field at fault in `param`."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _as_invalid_request(error, fields) from None


def _as_invalid_request(error: ValidationError, fields: dict[str, Any]) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param, field = _path(first["loc"])
    if param == "max_tokens" and fields.get("max_completion_tokens") is not None:
        param = "max_completion_tokens"
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is missing.", param=param)
    if first["type"] == "extra_forbidden":
        parent, _ = _path(first["loc"][:-1])
        name = str(first["loc"][-1])[:50]
        return InvalidRequest(f"{parent} must be {_EXPECTED[parent]}, not {name!r}.", param=parent)
    if (expected := _EXPECTED.get(param) or _EXPECTED.get(field)) is not None:
        return InvalidRequest(f"{param} must be {expected}.", param=param)
    return InvalidRequest(f"{param} is wrong: {first['msg'].lower()}.", param=param)


def _path(location: tuple[int | str, ...]) -> tuple[str, str]:
    """A location as messages[0].content, and its last field's name. pydantic's names of union members are cut off."""
    path, field = "", ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif field in _EXPECTED and field not in _NESTED:
            break
        elif re.fullmatch(r"[a-z_]+", part):
            path, field = f"{path}.{part}" if path else part, part
        else:
            break
    return path, field
