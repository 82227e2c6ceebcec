"""The architecture that the user names (-a) in the place of the one in the files. No torch."""

from collections.abc import Mapping
from typing import Any, TypeVar

from serve_app.models.registry import stored_name

_KEY = "general.architecture"

V = TypeVar("V")


def config_as(config: Mapping[str, Any], arch: str | None) -> dict[str, Any]:
    """A config.json that says arch; None: as it is. LaunchError for a name without a family."""
    return dict(config) if arch is None else {**config, "architectures": [stored_name(arch, is_gguf=False)]}


def metadata_as(metadata: Mapping[str, Any], arch: str | None) -> dict[str, Any]:
    """A GGUF's metadata that says arch; None: as it is. LaunchError for a name without a family.

    The keys of the architecture that it said before, which begin with that one's name, get the new name.
    """
    if arch is None:
        return dict(metadata)
    name = stored_name(arch, is_gguf=True)
    return renamed(metadata, str(metadata.get(_KEY)), name, name)


def renamed(metadata: Mapping[str, V], before: str, name: str, value: V) -> dict[str, V]:
    """Metadata with another architecture's name; value: that name, in the form of the values."""
    prefix = f"{before}."
    own = {f"{name}.{key.removeprefix(prefix)}": metadata[key] for key in metadata if key.startswith(prefix)}
    return {key: value for key, value in metadata.items() if not key.startswith(prefix)} | own | {_KEY: value}
