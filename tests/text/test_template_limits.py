import time
import tracemalloc

import pytest

from serve_app.errors import InvalidRequest
from serve_app.text import template_limits
from serve_app.text.chat_template import ChatTemplate

NESTING = "{% set n = namespace(s=['a']) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}"
GROWING = {
    "concatenation": "{% set n = namespace(s='aaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "addition": "{% set n = namespace(s='aaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "list addition": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "product": "{{ 'a' * 10**9 }}",
    "list product": "{{ [1] * 10**9 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "number product": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "output": "{% for i in range(100000) %}{{ 'b' * 10000 }}{% endfor %}",
    "literal output": "{% for i in range(100000) %}" + "A" * 10000 + "{% endfor %}",
    "captured output": "{% set x %}{% for i in range(100000) %}" + "A" * 10000 + "{% endfor %}{% endset %}",
    "macro output": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    + "A" * 1000
    + "{% endmacro %}{{ f(60) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "format width": "{{ '{:>1000000000}'.format(1) }}",
    "format argument": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "join": "{{ (['a' * 1000000] * 10000)|join }}",
    "join method": "{{ ''.join(['a' * 1000000] * 10000) }}",
    "replace": "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "replace method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "expandtabs": "{{ ('\t' * 1000000).expandtabs(10000) }}",
    "indent": "{{ ('\n' * 1000000)|indent(10000) }}",
    "indent by text": "{{ ('\n' * 1000000)|indent('a' * 1000000) }}",
    "JSON indent": "{{ [1, 2]|tojson(indent=1000000000) }}",
    "strftime": "{{ strftime_now('%1000000000d') }}",
    "range": "{{ range(10**9)|list }}",
}
NESTED = {
    "output": "{{ n.s }}",
    "JSON": "{{ n.s|tojson }}",
    "text": "{{ n.s|string }}",
    "upper": "{{ n.s|upper }}",
    "join": "{{ [n.s]|join }}",
    "concatenation": "{{ n.s ~ '' }}",
    "format": "{{ '{}'.format(n.s) }}",
    "percent": "{{ '%s' % n.s }}",
    "message": "{{ raise_exception(n.s) }}",
    "replacement": "{{ 'a'|replace(n.s, 'b') }}",
    "replacement method": "{{ 'a'.replace(n.s, 'b') }}",
    "separator": "{{ ['a', 'b']|join(n.s) }}",
    "layout": "{{ n.s|format(1) }}",
    "sum": "{{ ([range(10000)|list] * 10000)|sum(start=[]) }}",
}
SLOW = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.mark.parametrize("name", GROWING)
def test_no_template_makes_a_huge_value(name: str) -> None:
    template = ChatTemplate(GROWING[name])
    tracemalloc.start()
    with pytest.raises(InvalidRequest):
        template.render([])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 128 << 20


@pytest.mark.parametrize("name", NESTED)
def test_values_that_hold_themselves_many_times_are_never_written_out(name: str) -> None:
    start = time.thread_time()
    with pytest.raises(InvalidRequest):
        ChatTemplate(NESTING + NESTED[name]).render([])
    assert time.thread_time() - start < template_limits.MAX_CPU_S


@pytest.mark.parametrize("name", SLOW)
def test_no_template_runs_for_ever(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits.Budget.__init__, "__defaults__", (0.2, template_limits.MAX_CHARS))
    start = time.thread_time()
    with pytest.raises(InvalidRequest, match="too long"):
        ChatTemplate(SLOW[name]).render([])
    assert time.thread_time() - start < 2


def test_endless_recursion_ends() -> None:
    with pytest.raises(InvalidRequest, match="recursion"):
        ChatTemplate("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").render([])


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ self._TemplateReference__context.environment.globals }}",
    "{{ (messages|attr('__class__')).mro() }}",
    "{{ ''|attr('format')|attr('__globals__') }}{{ x.y }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].clear() }}",
    "{{ lipsum.__globals__.os.popen('id').read() }}",
    "{{ environment.extensions.clear() }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InvalidRequest):
        ChatTemplate(source).render(messages)
    assert messages == [{"role": "user", "content": "Hi"}]


def test_format_strings_do_not_reach_attributes() -> None:
    source = "{{ '{0.__class__}'.format(messages) }}{{ '{0[0].__class__.__mro__}'.format(messages) }}"
    with pytest.raises(InvalidRequest):
        ChatTemplate(source + "{{ x.y }}").render([{}])
    assert "class" not in ChatTemplate("{{ '{0.__class__}'.format(messages) }}").render([{}])


def test_long_conversations_are_within_the_limits() -> None:
    source = (
        "{% set n = namespace(text='') %}{% for m in messages %}"
        "{% set n.text = n.text + m.role ~ ': ' ~ m.content|trim|replace('a', 'b') ~ '\n' %}{% endfor %}{{ n.text }}"
    )
    messages = [{"role": "user", "content": "text " * 40}] * 1500
    assert len(ChatTemplate(source).render(messages)) == 1500 * (6 + 199 + 1)
