import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from serve_app.errors import InvalidRequest, ModelFileError
from serve_app.text.chat_template import ChatTemplate, choose_template

DATA = Path(__file__).parents[1] / "data/chat_templates"
CASES = json.loads((DATA / "cases_huggingfacejs.json").read_text(encoding="utf-8"))
FILES = sorted(p for p in DATA.glob("*/*") if p.suffix in (".jinja", ".json"))
TALK = [
    {"role": "user", "content": 'Is 1 < 2 & "true"?\n'},
    {"role": "assistant", "content": " Yes, Zoë! "},
    {"role": "user", "content": "Tell me more."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in <place>",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_renders_the_published_cases(case: dict[str, Any]) -> None:
    data = dict(case["data"])
    bos, eos = data.pop("bos_token", ""), data.pop("eos_token", "")
    template = ChatTemplate(case["chat_template"], bos=bos, eos=eos)
    prompt = template.render(
        data.pop("messages"), data.pop("tools", None), data.pop("add_generation_prompt", False), **data
    )
    assert prompt == case["target"]


def expected(source: str, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> str | None:
    """What transformers renders; None where the template refuses the conversation."""
    try:
        rendered, _ = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            bos_token="<s>",
            eos_token="</s>",
        )
    except Exception:  # it raises whatever comes up in the template
        return None
    text: str = rendered[0]
    return text


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("with_tools", [False, True])
def test_renders_every_template_file_as_transformers_does(path: Path, system: bool, with_tools: bool) -> None:
    text = path.read_text(encoding="utf-8")
    source = text if path.suffix == ".jinja" else json.loads(text)["chat_template"]
    option = {"jinja_explicit" if path.suffix == ".jinja" else "chat_template": str(path)}
    template = choose_template(**option, bos="<s>", eos="</s>")
    assert template is not None
    messages = [{"role": "system", "content": "Be kind."}, *TALK] if system else TALK
    for add_generation_prompt in (False, True):
        tools = TOOLS if with_tools else None
        target = expected(source, messages, tools, add_generation_prompt)
        if target is None and not with_tools:  # templates for tool use that need a list
            target = expected(source, messages, [], add_generation_prompt)
        if target is None:
            assert system, "only system messages are refused"
            assert path.name in ("mistral.json", "google-gemma-2-2b-it.jinja")
            with pytest.raises(InvalidRequest, match=r"roles must alternate|System role not supported") as caught:
                template.render(messages, tools, add_generation_prompt)
            assert caught.value.param == "messages"
        else:
            assert template.render(messages, tools, add_generation_prompt) == target


def test_text_parts_are_joined_for_templates_that_know_only_strings() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    plain = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert plain.render(messages) == "[a\nb]"
    own = ChatTemplate("{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endfor %}")
    assert own.render(messages) == "[a][b]"
    with pytest.raises(InvalidRequest, match="only text"):
        plain.render([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_options_reach_the_template_and_replace_nothing_of_ours() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ messages|length }}{{ unk_token }}", tokens={"unk_token": "?"})
    assert template.render(TALK, enable_thinking=False) == "False3?"


def test_generation_blocks_and_loop_controls() -> None:
    source = (
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    )
    assert ChatTemplate(source).render(TALK) == "user"


def test_named_variants() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"})
    assert template.render(TALK) == "plain"
    assert template.render(TALK, TOOLS) == "tools"
    assert ChatTemplate({"rag": "x"}).render(TALK) == "x"


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ a b }}", "{{ x|nofilter }}", "{{" + "(" * 5000, "{% if x %}" * 500]
)
def test_a_template_that_does_not_compile_names_its_origin(source: str) -> None:
    with pytest.raises(ModelFileError, match="here: the chat template does not compile"):
        ChatTemplate(source, origin="here")
    with pytest.raises(ModelFileError, match="characters long"):
        ChatTemplate("x" * (1 << 21), origin="here")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('No such role.') }}",
        "{{ messages[9].content }}",
        "{{ nothing.at.all }}",
        "{{ 1 + 'a' }}",
        "{{ 1 // 0 }}",
        "{{ tool|tojson }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends 'x' %}",
    ],
)
def test_what_a_template_refuses_is_the_client_s_400(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source).render(TALK)
    assert caught.value.param == "messages"


def folder_with(tmp_path: Path, **files: Any) -> Path:
    for name, content in files.items():
        file_name = name.replace("__", ".")
        (tmp_path / file_name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def chosen(**options: Any) -> str | None:
    template = choose_template(**options)
    return None if template is None else template.render([])


def test_precedence(tmp_path: Path) -> None:
    explicit, option = tmp_path / "explicit.jinja", tmp_path / "option.json"
    explicit.write_text("explicit")
    option.write_text('{"chat_template": "option"}')
    (tmp_path / "model").mkdir()
    folder = folder_with(
        tmp_path / "model",
        chat_template__jinja="jinja",
        tokenizer_config__json={"chat_template": "config"},
        chat_template__json={"chat_template": "json"},
    )
    gguf = {"tokenizer.chat_template": "gguf"}
    everything = {"folder": folder, "gguf_metadata": gguf}
    assert chosen(jinja_explicit=str(explicit), chat_template=str(option), **everything) == "explicit"
    assert chosen(chat_template=str(option), **everything) == "option"
    assert chosen(chat_template="{{ 'literal' }}", **everything) == "literal"
    for name, found in (
        ("chat_template.jinja", "jinja"),
        ("tokenizer_config.json", "config"),
        ("chat_template.json", "json"),
    ):
        assert chosen(**everything) == found
        (folder / name).unlink()
    assert chosen(**everything) == "gguf"
    assert chosen(folder=folder, gguf_metadata={}) is None
    assert chosen() is None


def test_the_forms_of_a_config(tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = folder_with(tmp_path, tokenizer_config__json={"chat_template": listed})
    template = choose_template(folder=folder)
    assert template is not None
    assert (template.render([]), template.render([], TOOLS)) == ("plain", "tools")
    gguf = choose_template(gguf_metadata={"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"})
    assert gguf is not None
    assert (gguf.render([]), gguf.render([], TOOLS)) == ("a", "b")


@pytest.mark.parametrize(
    "options",
    [
        {"jinja_explicit": "/no/such/file.jinja"},
        {"jinja_explicit": "{{ literal }}"},
        {"chat_template": "/no/such/file.json"},
        {"gguf_metadata": {"tokenizer.chat_template": 3}},
    ],
)
def test_a_missing_or_wrong_choice_is_an_error_and_no_fallback(options: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError):
        choose_template(**options)


@pytest.mark.parametrize("content", [{"chat_template": 3}, {"chat_template": [{"name": "x"}]}, {"chat_template": []}])
def test_refuses_configs_of_the_wrong_form(tmp_path: Path, content: Any) -> None:
    folder = folder_with(tmp_path, tokenizer_config__json=content)
    with pytest.raises(ModelFileError, match="chat_template"):
        choose_template(folder=folder)
    with pytest.raises(ModelFileError, match="chat_template"):
        choose_template(chat_template=str(folder_with(tmp_path, other__json={}) / "other.json"))
