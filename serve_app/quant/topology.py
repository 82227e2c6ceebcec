"""Topology files: which layers of a model get which type. YAML, in the form that mistral.rs has given them.

A mapping. Keys: a layer (`5`), layers without the last (`0-8`), or a pattern between slashes (`'/\\.mlp\\./'`) that is
searched for in the names of tensors. Values: a mapping with `isq: TYPE`, or nothing.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.errors import ModelFileError
from serve_app.quant.quant_type import MIXES, QuantType, encodable

logger = logging.getLogger(__name__)

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Topology:
    """file: for error messages. ranges: (first layer, layer after the last, type); patterns: (pattern, type)."""

    file: str
    ranges: tuple[tuple[int, int, QuantType], ...] = ()
    patterns: tuple[tuple[re.Pattern[str], QuantType], ...] = ()

    @property
    def types(self) -> tuple[QuantType, ...]:
        """Every type in the file once."""
        return tuple(dict.fromkeys([t for *_, t in self.ranges] + [t for _, t in self.patterns]))

    def type_of(self, layer: int | None, names: Sequence[str]) -> QuantType | None:
        """The type of a tensor of a layer (None: of none), which has any of the names; None where the file has none.

        The last pattern that matches counts, before any range; of the ranges the one that ends last, and of several of
        those the last in the file.
        """
        for pattern, wanted in reversed(self.patterns):
            if any(pattern.search(name) for name in names):
                return wanted
        found = None
        if layer is not None:
            for entry in self.ranges:
                if entry[0] <= layer < entry[1] and (found is None or entry[1] >= found[1]):
                    found = entry
        return None if found is None else found[2]

    def require_layers(self, n_layers: int) -> None:
        """ModelFileError for a range of layers that the model does not have."""
        for first, last, _ in self.ranges:
            if last > n_layers:
                key = f"{first}" if last == first + 1 else f"{first}-{last}"
                raise ModelFileError(f"{self.file}: key {key!r} names layers that a model of {n_layers} does not have")


def read_topology(path: Path) -> Topology:
    """ModelFileError naming file and key for a file that cannot be read or is no topology."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ModelFileError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: is no text in UTF-8") from error
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ModelFileError(f"{path}: is no valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not content:
        raise ModelFileError(f"{path}: is no topology: a mapping from layers to their types is needed")
    return _parsed(str(path), content)


def _parsed(file: str, content: dict[Any, Any]) -> Topology:
    ranges, patterns, has_devices = [], [], False
    for key, value in content.items():
        entry = {} if value is None else value
        if not isinstance(entry, dict) or set(entry) - {"isq", "device"}:
            raise ModelFileError(f"{file}: key {key!r} has other entries than isq and device")
        has_devices = has_devices or entry.get("device") is not None
        where = _place(file, key)
        if (name := entry.get("isq")) is None:
            continue
        wanted = _type(file, key, name)
        if isinstance(where, re.Pattern):
            patterns.append((where, wanted))
        else:
            ranges.append((*where, wanted))
    if has_devices:
        logger.warning("%s: its devices are not followed: a model is on one device as a whole", file)
    if not ranges and not patterns:
        raise ModelFileError(f"{file}: no key has an entry isq, so that nothing would be quantised")
    return Topology(file, tuple(ranges), tuple(patterns))


def _place(file: str, key: Any) -> tuple[int, int] | re.Pattern[str]:
    """Layers, or a pattern."""
    if isinstance(key, str) and len(key) > 2 and key.startswith("/") and key.endswith("/"):
        try:
            return re.compile(key[1:-1])
        except re.error as error:
            raise ModelFileError(f"{file}: key {key!r} is no regular expression ({error})") from error
    match = None if isinstance(key, bool) else _RANGE.fullmatch(str(key).strip())
    if match is None:
        raise ModelFileError(f"{file}: key {key!r} is neither a layer, nor layers (0-8), nor a pattern ('/attn/')")
    first = int(match[1])
    last = first + 1 if match[2] is None else int(match[2])
    if last <= first:
        raise ModelFileError(f"{file}: key {key!r} names no layer: the last one does not count")
    return first, last


def _type(file: str, key: Any, name: Any) -> QuantType:
    try:
        return encodable(name if isinstance(name, int) else str(name))
    except ValueError as error:
        is_mix = str(name).upper() in MIXES
        reason = f"{name} is a mix of types, a layer has one" if is_mix else str(error)
        raise ModelFileError(f"{file}: key {key!r}: isq: {reason}") from None
