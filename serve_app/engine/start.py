"""The start of an engine in a process without torch so far: memory is made ready while it is imported."""

from typing import TYPE_CHECKING

from serve_app.engine.no_collection import no_collection
from serve_app.gpu_info import num_gpus
from serve_app.loaders.early_memory import prepare_memory
from serve_app.options import EngineConfig, ModelSource

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine, OnDeltas


def start_engine(source: ModelSource, config: EngineConfig, on_deltas: "OnDeltas") -> "Engine":
    """As engine.build.build_engine."""
    if config.device == "cpu" or (config.device == "auto" and not num_gpus()):
        prepare_memory(source)
    with no_collection():
        from serve_app.engine.build import build_engine

        return build_engine(source, config, on_deltas)
