"""An engine that speculates by itself, a draft model in its own process: for programs that run it without a server."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from serve_app.engine.build import build_engine
from serve_app.engine.device_choice import choose_device
from serve_app.engine.engine import Engine, OnDeltas
from serve_app.engine.speculation.build_draft import build_draft
from serve_app.engine.speculation.draft_config import draft_config
from serve_app.engine.speculation.local_proposer import LocalProposer
from serve_app.loaders.isq_progress import LoadProgress
from serve_app.loaders.model_files import ModelFiles
from serve_app.options import EngineConfig, SpeculationOptions


@contextmanager
def local_engine(
    files: ModelFiles,
    config: EngineConfig,
    on_deltas: OnDeltas,
    speculation: SpeculationOptions,
    draft: ModelFiles | None = None,
    *,
    progress: LoadProgress | None = None,
) -> Iterator[Engine]:
    """build_engine's engine, stopped at the end. draft: the draft model, where speculation asks one.

    Its deadline does not count here: draft and target take turns. Raises as build_engine and build_draft do.
    """
    config = replace(config, device=choose_device(config.device))
    with ExitStack() as stack:
        proposer = None
        if draft is not None:
            # Before the engine, whose KV pool takes what a GPU has left.
            sizes = draft_config(config, is_on_gpu=config.device != "cpu")
            built = build_draft(draft, files, sizes, maps_text=speculation.maps_text, works_ahead=False)
            proposer = stack.enter_context(closing(LocalProposer(built.model)))
        engine = build_engine(files, config, on_deltas, progress=progress)
        stack.callback(engine.stop)
        engine.speculate(speculation, proposer)
        yield engine
