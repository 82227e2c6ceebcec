"""In-situ quantization: a model's weights become others while they are loaded, tensor by tensor."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from serve_app.errors import ModelFileError
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.isq_cache import open_cached
from serve_app.loaders.isq_importance import Calibrate, calibration_text, importance_key, read_importance
from serve_app.loaders.isq_progress import LoadProgress, LogProgress
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.quantized import Step, bits_per_weight, report_fallbacks
from serve_app.loaders.quantized_as_stored import sources_as_stored
from serve_app.loaders.quantized_importance import with_importance
from serve_app.loaders.quantized_plan import plan_steps
from serve_app.loaders.recode import Progress
from serve_app.loaders.recoded_checkpoint import CachedCheckpoint, RecodedCheckpoint
from serve_app.options import IsqOptions
from serve_app.quant.imatrix import read_imatrix
from serve_app.quant.mix import Recipe
from serve_app.quant.topology import read_topology

logger = logging.getLogger(__name__)

_ALREADY_SMALL = 9.5
"""Bits a weight up to which a source counts as quantised before."""


@dataclass(frozen=True, slots=True)
class IsqReport:
    """What was quantised. Bytes are of all tensors of the model, norms too; bits_per_weight: after it.

    num_tensors: those that changed; seconds: of reading, quantising and packing; is_cached: an earlier start did it.
    """

    name: str
    num_tensors: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    seconds: float
    is_cached: bool


class AsStored:
    """A load that quantises nothing, in the words of InSitu."""

    identity = None

    def __init__(self, checkpoint: Checkpoint, listener: LoadProgress | None) -> None:
        self.checkpoint = checkpoint
        self.progress: Progress | None = None if listener is None else listener.advance

    def running(self) -> AbstractContextManager[None]:
        """See InSitu."""
        return nullcontext()

    def report(self, label: str, started: float) -> None:
        """Nothing was quantised."""


class InSitu:
    """The quantisation of one load. checkpoint: what the model is built from; progress: for who builds it.

    identity: equal where two plans give equal weights of one model.
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint,
        steps: Sequence[Step],
        identity: str,
        listener: LoadProgress | None,
        *,
        is_old: bool = False,
    ) -> None:
        """listener: None where all is quantised already; is_old: an earlier start has done it."""
        self.checkpoint = checkpoint
        self.identity = identity
        self._name = recipe.name
        self._steps = steps
        self._listener = listener
        self.progress: Progress | None = None if listener is None else listener.advance
        self._is_old = is_old

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the model is built."""
        if self._listener is None:
            yield
            return
        self._listener.start(self._name, sum(step.source.num_bytes for step in self._steps))
        try:
            yield
        finally:
            self._listener.finish()

    def report(self, label: str, started: float) -> IsqReport:
        """The model has been built; a line in the log says what came of it. started: time.monotonic() before all."""
        report = IsqReport(
            self._name,
            sum(step.is_changed for step in self._steps),
            sum(step.source.num_bytes for step in self._steps),
            sum(target.num_bytes for step in self._steps for target in step.targets()),
            bits_per_weight(self._steps),
            time.monotonic() - started,
            self._is_old,
        )
        logger.info(
            "%s: %s, %d tensors quantised%s, %.2f bits a weight, %.1f → %.1f MB, %.1f s",
            label, report.name, report.num_tensors, " at an earlier start" if report.is_cached else "",
            report.bits_per_weight, report.bytes_before / 1e6, report.bytes_after / 1e6, report.seconds,
        )  # fmt: skip
        return report


def recipe_of(options: IsqOptions) -> Recipe | None:
    """What the options ask for; None where they name neither a type nor a topology.

    ModelFileError for an unknown type, two orders that contradict each other, and a bad topology file.
    """
    if options.type is None and options.topology is None:
        return None
    if options.imatrix is not None and options.calibration_file is not None:
        raise ModelFileError("an importance matrix and a text to compute one from were given: one of them can be used")
    topology = None if options.topology is None else read_topology(Path(options.topology).expanduser())
    try:
        return Recipe.parse(
            options.type, promotes=not options.is_pure, experts_only=options.experts_only, topology=topology
        )
    except ValueError as error:
        raise ModelFileError(f"in-situ quantization: {error}") from None


def plan(files: ModelFiles, opened: Checkpoint, recipe: Recipe) -> list[Step]:
    """What becomes of each tensor, before any importance. ModelFileError for what cannot be done; see plan_steps."""
    sources, facts = sources_as_stored(files, list(opened.stored()))
    return plan_steps(sources, recipe, facts, needs_gguf=False)


def check_isq(files: ModelFiles, opened: Checkpoint) -> None:
    """Looks whether the quantisation that files.isq asks for can be done, and whether its files can be read.

    ModelFileError for what would fail later.
    """
    recipe = None if files.isq is None else recipe_of(files.isq)
    if files.isq is None or recipe is None:
        return
    steps = plan(files, opened, recipe)
    if files.isq.imatrix is not None:
        with_importance(steps, read_imatrix(Path(files.isq.imatrix).expanduser()))
    if files.isq.calibration_file is not None:
        calibration_text(files.isq.calibration_file)


def prepare(
    files: ModelFiles,
    opened: Checkpoint,
    listener: LoadProgress | None = None,
    calibrate: Calibrate | None = None,
) -> InSitu | AsStored:
    """Plans the quantisation that files.isq asks for, if it asks for one.

    With a cache the result is mapped from there, and made there first where this is its first time. Nothing else is
    quantised yet. ModelFileError for what cannot be done.
    """
    options = files.isq
    recipe = None if options is None else recipe_of(options)
    if options is None or recipe is None:
        return AsStored(opened, listener)
    listener = listener or LogProgress()
    steps = plan(files, opened, recipe)
    report_fallbacks(steps)
    _warn_of_loss(files, steps)
    identity = _identity(steps, importance_key(files, options))

    @cache
    def final_steps() -> list[Step]:
        importance = read_importance(files, options, calibrate)
        return steps if importance is None else with_importance(steps, importance)

    if options.cache is not None:
        folder = Path(options.cache).expanduser()
        kept = open_cached(folder, files, recipe.name, steps, identity, final_steps, listener)
        if kept is not None:
            done, is_old = kept
            return InSitu(recipe, CachedCheckpoint(opened, steps, done), steps, identity, None, is_old=is_old)
    final = final_steps()
    return InSitu(recipe, RecodedCheckpoint(opened, final), final, identity, listener)


def _identity(steps: Sequence[Step], importance: str) -> str:
    """A hash of all types and of the importance."""
    types = {step.name: step.form.name for step in steps}
    return hashlib.blake2b(json.dumps([types, importance], sort_keys=True).encode(), digest_size=16).hexdigest()


def _warn_of_loss(files: ModelFiles, steps: Sequence[Step]) -> None:
    changed = [step for step in steps if step.is_changed]
    before = max((step.source.stored_form.bits_per_weight for step in changed), default=32.0)
    if before <= _ALREADY_SMALL:
        logger.warning("%s: is quantised already, and loses more by being quantised again", files.model_name)
