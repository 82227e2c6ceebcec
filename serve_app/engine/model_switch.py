"""Other weights for a model at work: made beside it, exchanged between two steps, undone where anything fails."""

import gc
import logging
import time
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace

import torch

from serve_app.engine.aside import run_aside
from serve_app.engine.switch_host import SwitchHost, Weights
from serve_app.engine.switch_plan import find_isq, make_plan, stamp, type_name
from serve_app.engine.weight_switch import Mode, Progress, SwitchPlan
from serve_app.errors import EngineFailed, ServeError, Unavailable
from serve_app.loaders.load import LoadedModel, load_model
from serve_app.loaders.model_files import ModelFiles
from serve_app.models.base import ModelArgs
from serve_app.options import IsqOptions, KvDType
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


class ModelSwitch:
    """See WeightSwitch. Methods may be called from any thread but the host's computing one, and all but isq_type and
    stop wait for what they do."""

    def __init__(self, host: SwitchHost, files: ModelFiles, args: ModelArgs, fingerprint: bytes) -> None:
        """files: those that the weights in use were loaded from; args, fingerprint: what they say of the model."""
        self._host = host
        self._files = files
        self._stamp = stamp(files)
        self._isq = files.isq
        self._fingerprint = fingerprint
        self._args = args
        self._plan: SwitchPlan | None = None
        self._prepared: Weights | None = None
        self._previous: Weights | None = None
        self._progress: Progress = lambda done: None
        self._waiting_for: Future[None] | None = None
        self._is_stopped = False

    @property
    def isq_type(self) -> str:
        """See WeightSwitch."""
        return type_name(self._isq)

    def plan(self, isq_type: str | int, num_sharing: int = 1) -> SwitchPlan:
        """See WeightSwitch."""
        isq = find_isq(isq_type, self._files.isq)
        return make_plan(isq, self._files, self._stamp, self._isq, self._host.device, num_sharing)

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
            self._host.withdraw(waiting_for)

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

    def _load(self, isq: IsqOptions | None) -> Weights:
        files = replace(self._files, isq=isq)
        loaded = load_model(
            files,
            dtype=files.dtype,
            device=self._host.device,
            kv=_KV_NAMES[self._host.kv_dtype],
            is_exact=self._host.is_exact,
            progress=_Listener(self),
            calibrate=read_once,
        )
        self._check(loaded)
        forward = self._host.forward_of(loaded.model)
        if self._host.num_graphs and not getattr(forward, "num_graphs", 0):
            raise EngineFailed("no CUDA graph of the new weights could be recorded beside the old ones")
        return Weights(isq, loaded.fingerprint, loaded.model, forward, self._host.angles_of(loaded.model))

    def _check(self, loaded: LoadedModel) -> None:
        """The cache, the tokenizer and what else was built around the model must go on to fit."""
        if loaded.args != self._args or loaded.kv_dtype != self._host.kv_dtype:
            raise EngineFailed("the model's files describe another model than the one that is served")

    def _install(self, new: Weights, *, drains: bool) -> Weights:
        """Puts weights in use, and returns those that were."""
        old = Weights(self._isq, self._fingerprint)

        def exchange() -> None:
            began = time.monotonic()
            num_texts = self._host.exchange(new, old)
            took_ms = (time.monotonic() - began) * 1e3
            log.info(
                "weights are %s now, were %s: exchanged in %.1f ms, %d texts are computed again",
                type_name(new.isq), type_name(old.isq), took_ms, num_texts,
            )  # fmt: skip

        self._wait(self._host.post(exchange, drains=drains))
        self._isq, self._fingerprint = new.isq, new.fingerprint
        return old

    def _switch_in_place(self, isq: IsqOptions | None) -> Weights:
        """Old weights out, memory free, new ones made, all while new requests wait. After an error the old ones are
        made again; where that fails, too, the host has failed, and its replica is replaced."""
        old = Weights(self._isq, self._fingerprint)
        self._wait(self._host.post(self._host.take_out, drains=True, holds_after=True))
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
            log.exception("the old weights could not be made again: there is no model any more")
            self._host.fail()
            raise

    def _wait(self, done: "Future[None]") -> None:
        self._waiting_for = done
        try:
            while True:
                if self._is_stopped:
                    self._host.withdraw(done)
                if wait([done], _POLL_S).done:
                    done.result()
                    return
                if self._host.is_gone:
                    raise Unavailable("the replica stopped before its weights were exchanged")
        finally:
            self._waiting_for = None

    def _free(self) -> None:
        """Gives back the memory of weights that nobody refers to any more."""
        gc.collect()
        if torch.device(self._host.device).type == "cuda":
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


def _sentence(error: BaseException) -> str:
    return error.message if isinstance(error, ServeError) else f"{type(error).__name__}: {error}"
