"""The Jinja that chat templates are written in: transformers' set-up, with the bounds of template_limits.

A template comes with a model's files, so it is only as trustworthy as whoever made them.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from itertools import pairwise
from typing import Any, Final

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from serve_app.text import template_limits as limits

# No chat template needs them, and their cost is hard to bound.
_UNWANTED_FILTERS: Final = ("pprint", "urlize", "wordwrap", "xmlattr")
# They make a text of whatever they get.
_TEXT_FILTERS: Final = (
    "capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "safe", "string", "striptags", "sum",
    "title", "trim", "truncate", "upper", "urlencode", "wordcount",
)  # fmt: skip
_NUMBER_FILTERS: Final = ("batch", "center", "round", "slice", "truncate")


class _Bounds(Extension):
    """Calls into the budget that the compiled template makes; reached by no name, so no template can replace them."""

    def tick(self, chars: int) -> str:
        """At each turn of a loop and each call of a macro; chars: of literal text in it."""
        limits.spend(chars)
        return ""

    def concat(self, *parts: Any) -> str:
        """The ~ operator."""
        limits.spend_passing(sum(limits.weigh(part) for part in parts))
        return "".join(map(str, parts))


class _Generation(Extension):
    """{% generation %} marks the assistant's text for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Bounded(NodeTransformer):
    """Puts the calls of _Bounds into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _bounds_call("concat", node.nodes, node.lineno)

    def _ticking(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        literal = sum(len(part.data) for child in node.body for part in _literals(child))
        self.generic_visit(node)
        tick = _bounds_call("tick", [nodes.Const(literal)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node


def _literals(node: nodes.Node) -> list[nodes.TemplateData]:
    own = [node] if isinstance(node, nodes.TemplateData) else []
    return [*own, *node.find_all(nodes.TemplateData)]


def _bounds_call(method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    function = nodes.ExtensionAttribute(_Bounds.identifier, method, lineno=line)
    return nodes.Call(function, args, [], None, None, lineno=line)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates. They are bounded while template_limits.current_budget is set."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Bounds, _Generation, loopcontrols],
            finalize=_written,
        )
        self.filters["tojson"] = to_json
        for name in _UNWANTED_FILTERS:
            del self.filters[name]
        for name in _NUMBER_FILTERS:
            self._guard(name, lambda *args, **kwargs: limits.checked_numbers(*args, *kwargs.values()))
        self._guard("format", lambda layout, *args, **_: limits.checked_format(layout, args))
        self._guard("indent", lambda text, width=4, *_, **__: limits.checked_indent(text, width))
        self._guard("replace", lambda text, old, new, *_: limits.checked_replace(text, old, new))
        for name in _TEXT_FILTERS:
            self._guard(name, lambda *args, **kwargs: limits.weigh((args, kwargs)))
        self.filters["join"] = _bounded_join(self.filters["join"])
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now
        del self.globals["lipsum"]

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        bounded: nodes.Template = _Bounded().visit(source)
        bounded.set_environment(self)
        return super()._generate(bounded, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limits.checked_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    # The odd names keep the template's own keyword arguments free.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes):
            args = limits.checked_method(owner, getattr(method, "__name__", ""), args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def _guard(self, name: str, check: Callable[..., Any]) -> None:
        self.filters[name] = _guarded(self.filters[name], check)


def _guarded(filter_: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(filter_, "jinja_pass_arg") else 0

    @wraps(filter_)  # keeps Jinja's marks: pass_environment and the like
    def guarded(*args: Any, **kwargs: Any) -> Any:
        check(*args[first:], **kwargs)
        return filter_(*args, **kwargs)

    return guarded


def _bounded_join(join: Callable[..., str]) -> Callable[..., str]:
    @wraps(join)
    def bounded(eval_context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        return join(eval_context, limits.checked_parts(value, limits.weigh(d)), d, attribute)

    return bounded


@pass_context  # without it Jinja would call this while it compiles
def _written(_: Context, value: Any) -> Any:
    """Every {{ expression }} passes here before it becomes text."""
    limits.spend(limits.weigh(value))
    return value


def raise_exception(message: Any) -> None:
    """Lets a template refuse a conversation; the message goes to the client."""
    limits.weigh(message)
    raise TemplateError(str(message)[:500])


def strftime_now(layout: str) -> str:
    """The local date and time by strftime's rules."""
    if len(layout) > 200 or any(a.isdigit() and b.isdigit() for a, b in pairwise(layout)):
        raise SecurityError("strftime_now got a format with a width")
    return datetime.now().strftime(layout)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers' templates expect it: Jinja's own filter would escape HTML characters."""
    limits.checked_json(limits.weigh(value), indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
