"""Bounds on what a chat template can cost: time, text, numbers.

Jinja's sandbox keeps a template from reaching out of itself; nothing in it keeps one from counting to 10^12 or from
doubling a string forty times. Whatever makes a text asks here first, before the text is made.
"""

import re
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, Final

from jinja2.exceptions import SecurityError

MAX_CPU_S: Final = 2.0
MAX_CHARS: Final = 16 << 20
_MAX_WIDTH: Final = 10_000
_MAX_FIELDS: Final = 1000
_MAX_BITS: Final = 4096
_CLOCK_EVERY: Final = 64
# What a part of a value counts for, in characters, when it is looked at and when it is only referred to.
_PART_CHARS: Final = 64
_REFERENCE_CHARS: Final = 8
# Values on the way to the text may be freed again; templates that grow a text piece by piece make many.
_PASSING_SHARE: Final = 16
_COMPUTED_WIDTH: Final = re.compile(r":[^{}]*\{")  # "{:{}}"
_TOO_LARGE: Final = "the chat template makes too large a value"


class Budget:
    """What one rendering may still use: CPU seconds of its thread, and characters written or joined."""

    def __init__(self, cpu_s: float = MAX_CPU_S, chars: int = MAX_CHARS) -> None:
        self._deadline = time.thread_time() + cpu_s
        self._chars = chars
        self._ticks = 0

    def spend(self, chars: int) -> None:
        """Takes characters off the budget, and looks at the clock now and then. Raises SecurityError."""
        self._chars -= chars
        if self._chars < 0:
            raise SecurityError(_TOO_LARGE)
        self._ticks += 1
        if self._ticks % _CLOCK_EVERY == 0 and time.thread_time() > self._deadline:
            raise SecurityError("the chat template takes too long")


current_budget: Final[ContextVar[Budget | None]] = ContextVar("current_budget", default=None)


def spend(chars: int) -> None:
    """Budget.spend of the rendering that goes on in this thread; none goes on while a template is compiled."""
    budget = current_budget.get()
    if budget is not None:
        budget.spend(chars)


def spend_passing(chars: int) -> None:
    """For a value that is not output yet."""
    if chars > MAX_CHARS:
        raise SecurityError(_TOO_LARGE)
    spend(chars // _PASSING_SHARE)


def weigh(value: Any) -> int:
    """About how many characters str() or JSON would make of a value; SecurityError where that is too many.

    Counts what is reached more than once each time, as str() does, and stops at the limit.
    """
    if isinstance(value, str):
        return len(value)
    total, waiting = 0, [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str | bytes):
            total += len(part)
        elif isinstance(part, Mapping):
            waiting += part.keys()
            waiting += part.values()
        elif isinstance(part, list | tuple | set | frozenset):
            waiting += part
        total += _PART_CHARS
        if total > MAX_CHARS or len(waiting) > MAX_CHARS:
            raise SecurityError(_TOO_LARGE)
    return total


def checked_binop(operator: str, left: Any, right: Any) -> None:
    """Refuses "+", "*", "**" and "%" with a huge result."""
    if isinstance(left, str) and operator == "%":
        checked_format(left, right)
        return
    sizes = [_size(v) for v in (left, right) if isinstance(v, str | bytes | list | tuple)]
    if operator == "+":
        chars = sum(sizes)
    elif sizes and operator == "*":
        chars = sizes[0] * max((v for v in (left, right) if isinstance(v, int)), default=1)
    else:
        chars = 0
        bits = [v.bit_length() for v in (left, right) if isinstance(v, int)]
        if operator == "**" and len(bits) == 2:
            bits = [bits[0] * max(right, 1)]
        if sum(bits) > _MAX_BITS:
            raise SecurityError(_TOO_LARGE)
    spend_passing(max(chars, 0))


def _size(value: Any) -> int:
    return len(value) * (1 if isinstance(value, str | bytes) else _REFERENCE_CHARS)


def checked_method(owner: str | bytes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Refuses a string method with a huge result; the arguments come back, iterators among them as lists."""
    values = (*args, *kwargs.values())
    if name == "join" and args:
        return (checked_parts(args[0], len(owner)),)
    if name == "replace" and len(args) >= 2:
        checked_replace(owner, args[0], args[1])
    elif name in ("format", "format_map"):
        checked_format(owner, values)
    else:
        width = _widest(values)
        spend_passing(len(owner) + width * (1 + len(owner) if name == "expandtabs" else 1))
    return args


def checked_parts(parts: Any, separator_chars: int) -> list[Any]:
    """The parts of a join as a list."""
    listed = list(parts) if isinstance(parts, Iterable) else []
    spend_passing(sum(weigh(part) + separator_chars for part in listed))
    return listed


def checked_replace(text: Any, old: Any, new: Any) -> None:
    """Replacing may make a text as much longer as it finds `old`."""
    weigh((text, old, new))
    text = str(text)
    spend_passing(len(text) + text.count(str(old)) * len(str(new)))


def checked_indent(text: Any, width: Any) -> None:
    """Indenting puts `width`, a number or a text, before every line."""
    chars = len(width) if isinstance(width, str) else _widest((width,))
    weigh(text)
    text = str(text)
    spend_passing(len(text) + (text.count("\n") + 1) * chars)


def checked_json(weight: int, indent: Any) -> None:
    """Indented JSON has a line for each of its values."""
    width = len(indent) if isinstance(indent, str) else _widest((indent,))
    spend_passing(weight + weight // _PART_CHARS * width)


def checked_format(layout: Any, values: Any) -> None:
    """Formats with "%" or the method format."""
    spend_passing(weigh((layout, values)))
    checked_layout(str(layout))


def checked_layout(layout: str) -> None:
    """Refuses formats ("%5d", "{:>5}") with a width of more than four digits, or of many fields."""
    if layout.count("%") + layout.count("{") > _MAX_FIELDS:
        raise SecurityError("the chat template formats too many fields at once")
    digits = 0
    for char in layout:
        digits = digits + 1 if char.isdigit() else 0
        if digits > 4:
            raise SecurityError("the chat template formats to too large a width")
    if ("%" in layout and "*" in layout) or _COMPUTED_WIDTH.search(layout):
        raise SecurityError("the chat template formats to a computed width")


def checked_numbers(*values: Any) -> None:
    """Refuses widths and counts over what a chat template can need."""
    spend(_widest(values))


def _widest(values: Iterable[Any]) -> int:
    widest = max((abs(v) for v in values if isinstance(v, int)), default=0)
    if widest > _MAX_WIDTH:
        raise SecurityError(f"the chat template asks for a width or count over {_MAX_WIDTH}")
    return widest
