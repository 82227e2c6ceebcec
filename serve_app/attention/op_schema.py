"""Calls of operators by the names in their schemas: libraries change the order of arguments between versions."""

from collections.abc import Mapping
from typing import Any

import torch


def missing_arguments(schema: torch.FunctionSchema, wanted: Mapping[str, str]) -> list[str]:
    """What of wanted (name → type, as schemas write them) an operator lacks, and what it asks for beyond.

    Arguments that may be None, or have defaults, are not asked for.
    """
    found = {argument.name: argument for argument in schema.arguments}
    wrong = [
        f"no {kind} {name}" for name, kind in wanted.items() if name not in found or _kind(found[name].type) != kind
    ]
    unknown = [
        f"{_kind(argument.type)} {name} is unknown"
        for name, argument in found.items()
        if name not in wanted and not _may_be_left_out(argument)
    ]
    return wrong + unknown


class BoundOperator:
    """An operator whose schema was checked: a call gives values by name, the others are None or their defaults."""

    def __init__(self, operator: Any, schema: torch.FunctionSchema) -> None:
        self._operator = operator
        self._order = [
            (argument.name, argument.default_value if argument.has_default_value() else None)
            for argument in schema.arguments
        ]

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Values under names of the schema; a name that it lacks is a mistake of ours."""
        assert set(values) <= {name for name, _ in self._order}, "a value is given under a name that the schema lacks"
        return self._operator(*(values.get(name, default) for name, default in self._order))


def _may_be_left_out(argument: torch.Argument) -> bool:
    return argument.has_default_value() or isinstance(argument.type, torch.OptionalType)


def _kind(type_: Any) -> str:
    return str(type_.getElementType() if isinstance(type_, torch.OptionalType) else type_)
