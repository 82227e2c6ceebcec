"""What is said of a backend that was looked at."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackendReport:
    """One backend as looked at: is_usable and why; the first usable one of a list is the one that 'auto' takes."""

    name: str
    is_usable: bool
    reason: str
