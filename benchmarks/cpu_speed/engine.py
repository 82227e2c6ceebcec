"""What a measured engine is to the plan: something with a name that measures a cell when told, and rests otherwise."""

from typing import Any, Protocol

from benchmarks.cpu_speed.cells import Cell, Sample


class Engine(Protocol):
    """One engine with one model. It may be stopped at any time and starts again when it is next measured."""

    @property
    def name(self) -> str:
        """As the table's head has it."""

    @property
    def facts(self) -> dict[str, Any]:
        """Version, model file, KV dtype and the like, as far as known by now."""

    @property
    def needed_bytes(self) -> int:
        """Memory that a loaded engine takes, roughly; 0 for one that keeps nothing between measurements."""

    @property
    def is_loaded(self) -> bool:
        """Whether it holds its model now."""

    def can(self, cell: Cell) -> bool:
        """Whether the engine has such a cell at all."""

    def measure(self, cell: Cell, seed: int) -> Sample:
        """Loads the model where needed, and measures once. Raises EngineError; the seed varies the prompts."""

    def stop(self) -> None:
        """Frees its memory."""


class EngineError(Exception):
    """An engine could not be started, or failed in a cell."""
