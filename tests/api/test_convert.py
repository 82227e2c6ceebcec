from typing import Any

import pytest

from serve_app.api.convert import chat_prompt, completion_prompts
from serve_app.api.schema import ChatRequest, CompletionRequest, parse_request
from serve_app.errors import InvalidRequest
from serve_app.options import DryParams, RequestSpeculation, SamplingParams


def _chat(**fields: Any) -> Any:
    return chat_prompt(parse_request(ChatRequest, {"messages": "hi", **fields}), "id", b"")


def test_only_named_fields_become_sampling():
    assert _chat().sampling == {}
    assert _chat(temperature=None, stop=None, n=None, logit_bias={}).sampling == {}


def test_every_field_has_its_place():
    prompt = _chat(
        max_completion_tokens=7,
        temperature=1,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        n=2,
        stop="END",
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "7": 1.5},
        seed=-1,
        logprobs=True,
        top_logprobs=3,
        dry_multiplier=0.8,
        dry_sequence_breakers=["\n"],
        ignore_eos=True,
        min_tokens=2,
        stop_token_ids=[9],
        truncate_sequence=True,
        enable_thinking=False,
        chat_template_kwargs={"enable_thinking": True, "reasoning_effort": "low"},
        unknown_field={"is": "ignored"},
        user="someone",
    )
    assert prompt.sampling == {
        "max_tokens": 7,
        "temperature": 1.0,
        "top_p": 0.5,
        "top_k": 0,
        "min_p": 0.1,
        "n": 2,
        "stop": ("END",),
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "repetition_penalty": 1.1,
        "logit_bias": ((5, -100.0), (7, 1.5)),
        "seed": 2**64 - 1,
        "logprobs": 3,
        "dry": DryParams(multiplier=0.8, sequence_breakers=("\n",)),
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": (9,),
    }
    SamplingParams().with_overrides(prompt.sampling)
    assert prompt.truncate_sequence
    assert prompt.template_options == {"enable_thinking": False, "reasoning_effort": "low"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, RequestSpeculation()),
        ({"enabled": True}, RequestSpeculation()),
        ({"enabled": None, "max_tokens": None}, RequestSpeculation()),
        ({"enabled": False}, RequestSpeculation(enabled=False)),
        ({"max_tokens": 0}, RequestSpeculation(enabled=False)),
        ({"enabled": False, "max_tokens": 5}, RequestSpeculation(enabled=False)),
        ({"max_tokens": 16}, RequestSpeculation(max_tokens=16)),
    ],
)
def test_a_wish_of_speculation(given, expected):
    assert _chat(speculative=given).sampling == {"speculation": expected}
    (prompt,) = completion_prompts(parse_request(CompletionRequest, {"prompt": "x", "speculative": given}), "r", b"")
    assert SamplingParams().with_overrides(prompt.sampling).speculation == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 17}, "speculative.max_tokens must be a whole number from 0 (off) to 16."),
        ({"enabled": 1}, "speculative.enabled must be true or false."),
        ({"gamma": 1}, "speculative must be an object with enabled or max_tokens, not 'gamma'."),
        (5, "speculative must be an object with enabled or max_tokens."),
    ],
)
def test_a_wrong_wish_of_speculation_is_told_its_limits(given, message):
    with pytest.raises(InvalidRequest) as caught:
        _chat(speculative=given, max_completion_tokens=4)
    assert caught.value.message == message
    assert message.startswith(f"{caught.value.param} ")


def test_messages_become_what_templates_expect():
    prompt = _chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
                "name": "Bo",
            },
            {
                "role": "assistant",
                "content": None,
                "reasoning": "hm",
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ]
    )
    assert prompt.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo", "name": "Bo"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]


def test_a_bare_string_is_one_user_message():
    assert _chat(messages="hello").messages == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("arguments", ["{", '"' * 3, "[" * 100_000])
def test_broken_arguments_of_an_earlier_call_are_refused(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(InvalidRequest, match="not JSON"):
        _chat(messages=[{"role": "assistant", "tool_calls": [call]}])


def test_tools_with_choice_none_ask_for_nothing():
    assert _chat(tools=[{"type": "function"}], tool_choice="none").tools is None


def test_prompts_are_numbered_in_order():
    request = parse_request(CompletionRequest, {"prompt": ["a", "b"], "echo": True, "logprobs": 0})
    first, second = completion_prompts(request, "cmpl-1", b"t")
    assert (first.request_id, second.request_id) == ("cmpl-1-0", "cmpl-1-1")
    assert (first.prompt, second.prompt) == ("a", "b")
    assert first.echo
    assert first.sampling == {"logprobs": 0, "prompt_logprobs": True}
    assert first.cache_salt == b"t"
    (only,) = completion_prompts(parse_request(CompletionRequest, {"prompt": [1, 2]}), "cmpl-2", b"")
    assert (only.request_id, only.prompt) == ("cmpl-2", [1, 2])
