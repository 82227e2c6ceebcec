"""Other weights for a running engine: made beside it, exchanged between two steps, undone where anything fails."""

import gc
import logging
import time
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, replace

import torch

from serve_app.engine.aside import run_aside
from serve_app.engine.engine import Engine
from serve_app.engine.forward import Forward
from serve_app.engine.kv_plan import KvPlan
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.switch_plan import find_isq, make_plan, stamp, type_name
from serve_app.engine.weight_switch import Mode, Progress, SwitchPlan
from serve_app.errors import EngineFailed, ServeError, Unavailable
from serve_app.layers.angle_sets import AngleSets
from serve_app.loaders.load import LoadedModel, load_model
from serve_app.loaders.model_files import ModelFiles
from serve_app.models.base import CausalLM
from serve_app.options import EngineConfig, IsqOptions, KvDType
from serve_app.quant.imatrix import Importance

log = logging.getLogger(__name__)

_POLL_S = 0.1
_KV_NAMES: dict[torch.dtype, KvDType] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.uint8: "q8",
    torch.float8_e4m3fn: "f8e4m3",
}


@dataclass(slots=True)
class _Weights:
    """A model that is not in use. model None: it is not in memory either."""

    isq: IsqOptions | None
    fingerprint: bytes
    model: CausalLM | None = None
    forward: Forward | None = None
    angles: AngleSets | None = None


class ModelSwitch:
    """See WeightSwitch. Methods may be called from any thread but the stepping one, and all but isq_type and stop wait
    for what they do."""

    def __init__(self, engine: Engine, runner: ModelRunner, files: ModelFiles, loaded: LoadedModel) -> None:
        self._engine = engine
        self._config: EngineConfig = engine.config
        self._runner = runner
        self._files = files
        self._stamp = stamp(files)
        self._isq = files.isq
        self._fingerprint = loaded.fingerprint
        self._args = loaded.args
        self._plan: SwitchPlan | None = None
        self._prepared: _Weights | None = None
        self._previous: _Weights | None = None
        self._progress: Progress = lambda done: None
        self._waiting_for: Future[None] | None = None
        self._is_stopped = False

    @property
    def isq_type(self) -> str:
        """See WeightSwitch."""
        return type_name(self._isq)

    def plan(self, isq_type: str | int) -> SwitchPlan:
        """See WeightSwitch."""
        isq = find_isq(isq_type, self._files.isq)
        return make_plan(isq, self._files, self._stamp, self._isq, str(self._runner.device))

    def prepare(self, plan: SwitchPlan, progress: Progress) -> None:
        """See WeightSwitch."""
        assert self._prepared is None
        assert self._previous is None
        self._plan, self._progress = plan, progress
        if not plan.in_place:
            self._prepared = run_aside(lambda: self._load(plan.isq))
            progress(1.0)

    def switch(self, mode: Mode) -> None:
        """See WeightSwitch."""
        plan = self._plan
        assert plan is not None, "nothing is prepared"
        if plan.in_place:
            self._previous = self._switch_in_place(plan.isq)
        else:
            assert self._prepared is not None
            new, self._prepared = self._prepared, None
            self._previous = self._install(new, drains=mode == "drain")

    def settle(self) -> None:
        """See WeightSwitch."""
        self._plan = self._prepared = self._previous = None
        self._is_stopped = False
        self._free()

    def stop(self) -> None:
        """See WeightSwitch."""
        self._is_stopped = True
        waiting_for = self._waiting_for
        if waiting_for is not None:
            self._engine.border.withdraw(waiting_for)

    def undo(self) -> None:
        """See WeightSwitch."""
        previous, self._previous = self._previous, None
        self._plan = self._prepared = None
        self._is_stopped = False
        if previous is not None:
            if previous.model is None:
                self._switch_in_place(previous.isq)
            else:
                self._install(previous, drains=False)
        self._free()

    @property
    def source_bytes(self) -> int:
        """What is read while weights are made."""
        return max(1, self._plan.source if self._plan is not None else 1)

    def note(self, done: float) -> None:
        """Called while weights are made. Raises CancelledError when that is to end."""
        if self._is_stopped:
            raise CancelledError
        self._progress(done)

    def _load(self, isq: IsqOptions | None) -> _Weights:
        files = replace(self._files, isq=isq)
        loaded = load_model(
            files,
            dtype=files.dtype,
            device=str(self._runner.device),
            kv=_KV_NAMES[self._runner.kv_pool.dtype],
            is_exact=self._config.cpu_exact,
            progress=_Listener(self),
            calibrate=read_once,
        )
        self._check(loaded)
        forward = self._runner.forward_of(loaded.model)
        if self._runner.num_graphs and not getattr(forward, "num_graphs", 0):
            raise EngineFailed("no CUDA graph of the new weights could be recorded beside the old ones")
        angles = KvPlan.of(loaded.model, self._config, self._files.max_seq_len).angles
        return _Weights(isq, loaded.fingerprint, loaded.model, forward, angles)

    def _check(self, loaded: LoadedModel) -> None:
        """The cache, the tokenizer and what else the engine was built around must go on to fit."""
        if loaded.args != self._args or loaded.kv_dtype != self._runner.kv_pool.dtype:
            raise EngineFailed("the model's files describe another model than the one that is served")

    def _install(self, new: _Weights, *, drains: bool) -> _Weights:
        """Puts weights in use, and returns those that were."""
        old = _Weights(self._isq, self._fingerprint)

        def exchange() -> None:
            began = time.monotonic()
            num_running = recompute_running(self._engine)
            scheduler = self._engine.parts.scheduler
            scheduler.pool.renew(new.fingerprint)
            old.model, old.forward = self._runner.exchange(new.model, new.forward)
            assert new.angles is not None
            old.angles = scheduler.exchange_angles(new.angles)
            took_ms = (time.monotonic() - began) * 1e3
            log.info(
                "weights are %s now, were %s: exchanged in %.1f ms, %d requests are computed again",
                type_name(new.isq), type_name(old.isq), took_ms, num_running,
            )  # fmt: skip

        self._wait(self._engine.border.post(exchange, drains=drains))
        self._isq, self._fingerprint = new.isq, new.fingerprint
        return old

    def _switch_in_place(self, isq: IsqOptions | None) -> _Weights:
        """Old weights out, memory free, new ones made, all while new requests wait. After an error the old ones are
        made again; where that fails, too, the engine has failed, and its replica is replaced."""
        old = _Weights(self._isq, self._fingerprint)
        border = self._engine.border
        self._wait(border.post(self._take_out, drains=True, holds_after=True))
        self._free()
        try:
            self._install(self._load(isq), drains=False)
        except BaseException as error:
            log.warning("the new weights could not be made, the old ones are made again: %s", _sentence(error))
            self._is_stopped = False
            self._make_again(old.isq)
            raise
        return old

    def _make_again(self, isq: IsqOptions | None) -> None:
        self._free()
        try:
            self._install(self._load(isq), drains=False)
        except BaseException:
            log.exception("the old weights could not be made again: the engine has no model any more")
            self._engine.is_failed = True
            raise

    def _take_out(self) -> None:
        self._runner.exchange(None, None)

    def _wait(self, done: "Future[None]") -> None:
        self._waiting_for = done
        try:
            while True:
                if self._is_stopped:
                    self._engine.border.withdraw(done)
                if wait([done], _POLL_S).done:
                    done.result()
                    return
                if self._engine.is_stopped or self._engine.is_failed:
                    raise Unavailable("the engine stopped before its weights were exchanged")
        finally:
            self._waiting_for = None

    def _free(self) -> None:
        """Gives back the memory of weights that nobody refers to any more."""
        gc.collect()
        if torch.device(self._runner.device).type == "cuda":
            torch.cuda.empty_cache()


class _Listener:
    """A LoadProgress: says how much of a model is loaded, and ends the loading when the switch is stopped."""

    def __init__(self, switch: ModelSwitch) -> None:
        self._switch = switch
        self._total, self._done = switch.source_bytes, 0

    def start(self, title: str, total_bytes: int) -> None:
        """See LoadProgress."""
        self._total, self._done = max(1, total_bytes), 0

    def advance(self, tensor: str, num_bytes: int) -> None:
        """See LoadProgress."""
        self._done += num_bytes
        self._switch.note(min(1.0, self._done / self._total))

    def finish(self) -> None:
        """See LoadProgress."""


def read_once(files: ModelFiles, text: str) -> Importance:
    """See loaders.isq_importance.Calibrate."""
    from serve_app.engine.calibration import calibrate

    return calibrate(files, text)


def recompute_running(engine: Engine) -> int:
    """Sends every running request back to the head of the queue, to be computed from its first token; how many.

    Only between two steps. No block is held afterwards, and what waits must be hashed anew.
    """
    scheduler, collector = engine.parts.scheduler, engine.parts.collector
    running = list(reversed(scheduler.running))
    for request in running:
        scheduler.requeue(request)
    for request in scheduler.waiting:
        request.block_hashes = []
        if not request.num_output:
            # A prompt's numbers are one model's. What was told already stays.
            if request.prompt_logprobs:
                request.prompt_logprobs = []
            collector.raw_logits.get(request.request_id, []).clear()
    return len(running)


def _sentence(error: BaseException) -> str:
    return error.message if isinstance(error, ServeError) else f"{type(error).__name__}: {error}"
