"""JSON as strict as the standard: what Python's parser lets through beyond it is refused."""

import json
import math
import re
from typing import Any, NoReturn

from serve_app.errors import InvalidRequest

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises InvalidRequest for bad UTF-8 or JSON, NaN and infinities (1e999 too), a key given twice, half a
    surrogate pair, numbers of thousands of digits, nesting over max_depth, and anything but an object.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid UTF-8.") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError:
        raise InvalidRequest("The body holds a number with too many digits.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    _check_depth(value, max_depth)
    if _SURROGATE_ESCAPE.search(body):
        _check_text(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequest(f"The key {json.dumps(twice[:100])} is given twice in one object.", param=twice[:100])
    return result


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise InvalidRequest(f"The number {digits[:40]} is too large.")
    return value


def _constant(name: str) -> NoReturn:
    raise InvalidRequest(f"{name} is not valid JSON.")


def _check_depth(value: Any, max_depth: int) -> None:
    """Level by level, without recursion."""
    level = [value]
    for _ in range(max_depth):
        level = [item for parent in level for item in _items(parent) if isinstance(item, dict | list)]
        if not level:
            return
    raise _too_deep(max_depth)


def _check_text(value: Any) -> None:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            if _SURROGATE.search(item):
                raise InvalidRequest("A text holds half of a surrogate pair, which is no character.")
        elif isinstance(item, dict):
            todo.extend(item)
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)


def _items(parent: Any) -> Any:
    return parent.values() if isinstance(parent, dict) else parent


def _too_deep(max_depth: int) -> InvalidRequest:
    return InvalidRequest(f"The body is nested deeper than {max_depth} levels.")
