"""Checked reading of a model's configuration: every misfit names the file and the key."""

import math
from typing import Any

from serve_app.errors import ModelFileError

MAX_COUNT = 1 << 24
"""No model has a dimension, layer count or vocabulary beyond this; a file that says so is broken."""


class ConfigReader:
    """Reads numbers and flags from config.json or GGUF metadata."""

    def __init__(self, values: dict[str, Any], file: str) -> None:
        self._values = values
        self.file = file

    def fail(self, key: str, problem: str) -> ModelFileError:
        """The error to raise for a key."""
        return ModelFileError(f"{self.file}: key {key!r} {problem}")

    def get(self, key: str) -> Any:
        """The value as it is; None where it is missing or null."""
        return self._values.get(key)

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number from `least` to MAX_COUNT. A list, as GGUF has them per layer, must hold one number only."""
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, list):
            if not value or any(v != value[0] for v in value):
                raise self.fail(key, "differs from layer to layer, which is not supported")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_COUNT:
            raise self.fail(key, f"is {value!r}, not a whole number from {least} to {MAX_COUNT}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._values.get(key, default)
        if value is None:
            value = default
        if value is None:
            raise self.fail(key, "is missing")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self.fail(key, f"is {value!r}, not a number above 0")
        return float(value)

    def number_or_none(self, key: str, default: float = 0.0) -> float:
        """A finite number above 0, or 0 where it is null or 0: none. default: where it is missing."""
        if key not in self._values:
            return default
        return self.number(key) if self._values[key] else 0.0

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above 0."""
        values = self._values.get(key)
        if not isinstance(values, list) or not values:
            raise self.fail(key, "is missing or no list of numbers")
        return tuple(ConfigReader({key: value}, self.file).number(key) for value in values)

    def choice(self, key: str, default: str, supported: tuple[str, ...]) -> str:
        """One of a few words."""
        value = self._values.get(key)
        if value is None:
            value = default
        if value not in supported:
            raise self.fail(key, f"is {value!r}; supported is {' or '.join(supported)}")
        return str(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, f"is {value!r}, not true or false")
        return value

    def section(self, key: str) -> "ConfigReader | None":
        """A nested object; None where it is missing or null."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "is not an object")
        return ConfigReader(value, f"{self.file}, {key}")
