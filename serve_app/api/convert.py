"""OpenAI's requests as the messages of the application: the only place that knows both."""

import hashlib
import json
from typing import Any

from serve_app.api.schema import ChatRequest, CompletionRequest, GenerationRequest, Message, Speculative
from serve_app.errors import InvalidRequest, NotImplementedHere
from serve_app.messages import PromptInput
from serve_app.options import DryParams, RequestSpeculation

_SAME_NAME = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "n",
)


def chat_prompt(request: ChatRequest, request_id: str, tenant: bytes) -> PromptInput:
    """The conversation before its template. Raises InvalidRequest or NotImplementedHere naming the message at fault."""
    sampling = _sampling(request)
    if request.logprobs:
        sampling["logprobs"] = request.top_logprobs or 0
    return PromptInput(
        request_id,
        messages=[_message(message, index) for index, message in enumerate(request.messages)],
        sampling=sampling,
        template_options=_template_options(request),
        truncate_sequence=bool(request.truncate_sequence),
        cache_salt=_cache_salt(tenant, request.cache_salt),
    )


def completion_prompts(request: CompletionRequest, request_id: str, tenant: bytes) -> list[PromptInput]:
    """One input per prompt, in the request's order. Raises InvalidRequest for a prompt of no token ids."""
    sampling = _sampling(request)
    if request.logprobs is not None:
        sampling["logprobs"] = request.logprobs
        sampling["prompt_logprobs"] = bool(request.echo)
    prompts = request.prompts
    if not prompts or any(prompt == [] for prompt in prompts):
        raise InvalidRequest("prompt is empty.", param="prompt")
    return [
        PromptInput(
            request_id if len(prompts) == 1 else f"{request_id}-{index}",
            prompt=prompt,
            sampling=dict(sampling),
            truncate_sequence=bool(request.truncate_sequence),
            echo=bool(request.echo),
            cache_salt=_cache_salt(tenant, request.cache_salt),
        )
        for index, prompt in enumerate(prompts)
    ]


def _sampling(request: GenerationRequest) -> dict[str, Any]:
    """The SamplingParams fields that the client named."""
    given = {name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None}
    if request.top_k is not None:
        given["top_k"] = max(request.top_k, 0)
    if request.seed is not None:
        given["seed"] = request.seed % 2**64
    if request.stop:
        given["stop"] = tuple(request.stop)
    if request.stop_token_ids:
        given["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias:
        given["logit_bias"] = _logit_bias(request.logit_bias)
    dry = _dry(request)
    if dry is not None:
        given["dry"] = dry
    if request.speculative is not None:
        given["speculation"] = _speculation(request.speculative)
    return given


def _speculation(wanted: Speculative) -> RequestSpeculation:
    if wanted.enabled is False or wanted.max_tokens == 0:
        return RequestSpeculation(enabled=False)
    return RequestSpeculation(max_tokens=wanted.max_tokens)


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    by_id = {int(token_id): value for token_id, value in bias.items()}
    if len(by_id) != len(bias):
        raise InvalidRequest("logit_bias names a token id twice.", param="logit_bias")
    return tuple(by_id.items())


def _dry(request: GenerationRequest) -> DryParams | None:
    given: dict[str, Any] = {
        "multiplier": request.dry_multiplier,
        "base": request.dry_base,
        "allowed_length": request.dry_allowed_length,
        "sequence_breakers": None if request.dry_sequence_breakers is None else tuple(request.dry_sequence_breakers),
    }
    named = {name: value for name, value in given.items() if value is not None}
    return DryParams(**named) if named else None


def _template_options(request: ChatRequest) -> dict[str, Any]:
    """What the template is told besides the messages. The request's own fields win over chat_template_kwargs."""
    options = dict(request.chat_template_kwargs or {})
    if not isinstance(options.get("enable_thinking", True), bool):
        raise InvalidRequest("enable_thinking must be true or false.", param="chat_template_kwargs")
    if not isinstance(options.get("reasoning_effort", ""), str):
        raise InvalidRequest("reasoning_effort must be a string.", param="chat_template_kwargs")
    if request.enable_thinking is not None:
        options["enable_thinking"] = request.enable_thinking
    if request.reasoning_effort is not None:
        options["reasoning_effort"] = request.reasoning_effort
    return options


def _message(message: Message, index: int) -> dict[str, Any]:
    """A message as chat templates expect it; developer is system's newer name, which templates do not know."""
    where = f"messages[{index}]"
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(f"{where}.content is missing.", param=f"{where}.content")
    result: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(message.content, f"{where}.content"),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            result[name] = value
    if message.tool_calls:
        result["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    return result


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str | None:
    """Text parts become lines of one text."""
    if content is None or isinstance(content, str):
        return content
    if not content:
        raise InvalidRequest(f"{where} has no parts.", param=where)
    return "\n".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part_text(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        name = kind[:50] if isinstance(kind, str) else "unknown"
        raise InvalidRequest(f"{where}: content parts of type {name!r} are not supported by this model.", param=where)
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.{kind} must be a string.", param=f"{where}.{kind}")
    return text


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """An earlier call in a conversation. Templates want its arguments as an object, OpenAI sends them as a string."""
    function = call.get("function")
    if call.get("type", "function") != "function":
        raise NotImplementedHere(f"{where}: only function calls are known.", param=where)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where}.function needs a name.", param=f"{where}.function")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InvalidRequest(f"{where}.function.arguments is not JSON.", param=f"{where}.function") from None
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _cache_salt(tenant: bytes, salt: str | None) -> bytes:
    """Cached blocks are shared within one API key, and within it only between requests of the same cache_salt."""
    if salt is None:
        return tenant
    return hashlib.blake2b(salt.encode(), key=tenant, digest_size=16).digest()
