"""generation_config.json: when a model ends its text, and how it is best sampled."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from serve_app.errors import ModelFileError
from serve_app.options import SamplingParams


def token_ids(value: Any, file: str, key: str) -> tuple[int, ...]:
    """A token id, a list of them or null; ModelFileError for anything else."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(v) is int and 0 <= v < 2**31 for v in values):
        raise ModelFileError(f"{file}: key {key!r} is no token id")
    return tuple(values)


def sampling_defaults(config: Mapping[str, Any], file: str) -> SamplingParams:
    """The model's own defaults over OpenAI's (temperature 1, no filters), under what a request asks for.

    do_sample false means greedy. max_new_tokens is the default of max_tokens. Raises ModelFileError naming file and
    key for a value out of range.
    """
    fields = {}
    for key, (name, read) in _KEYS.items():
        value = config.get(key)
        if value is None:
            continue
        if type(value) is bool or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelFileError(f"{file}: key {key!r} is no number")
        try:
            fields[name] = read(value)
        except ValueError as error:
            raise ModelFileError(f"{file}: key {key!r} is {value}, {error}") from error
    if config.get("do_sample") is False:
        fields["temperature"] = 0.0
    return SamplingParams(**fields)


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[float], float]:
    def read(value: float) -> float:
        if not low <= value <= high or (above and value == low):
            raise ValueError(f"outside of {low:g} to {high:g}")
        return float(value)

    return read


def _count(value: float) -> int:
    if value != int(value) or value < 1:
        raise ValueError("no positive whole number")
    return int(value)


def _top_k(value: float) -> int:
    return 0 if value in (0, -1) else _count(value)


_KEYS: dict[str, tuple[str, Callable[[float], Any]]] = {
    "temperature": ("temperature", _number(0)),
    "top_k": ("top_k", _top_k),
    "top_p": ("top_p", _number(0, 1, above=True)),
    "min_p": ("min_p", _number(0, 1)),
    "repetition_penalty": ("repetition_penalty", _number(0, above=True)),
    "max_new_tokens": ("max_tokens", _count),
}
