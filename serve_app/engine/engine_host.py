"""An engine, as a change of its weights sees it."""

from collections.abc import Callable
from concurrent.futures import Future

import torch

from serve_app.engine.engine import Engine
from serve_app.engine.forward import Forward
from serve_app.engine.kv_plan import KvPlan
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.switch_host import Weights
from serve_app.layers.angle_sets import AngleSets
from serve_app.models.base import CausalLM


class EngineHost:
    """See SwitchHost."""

    def __init__(self, engine: Engine, runner: ModelRunner, max_seq_len: int) -> None:
        self._engine = engine
        self._runner = runner
        self._max_seq_len = max_seq_len

    @property
    def device(self) -> str:
        """See SwitchHost."""
        return str(self._runner.device)

    @property
    def kv_dtype(self) -> torch.dtype:
        """See SwitchHost."""
        return self._runner.kv_pool.dtype

    @property
    def is_exact(self) -> bool:
        """See SwitchHost."""
        return self._engine.config.cpu_exact

    @property
    def num_graphs(self) -> int:
        """See SwitchHost."""
        return self._runner.num_graphs

    @property
    def is_gone(self) -> bool:
        """See SwitchHost."""
        return self._engine.is_stopped or self._engine.is_failed

    def forward_of(self, model: CausalLM) -> Forward:
        """See SwitchHost."""
        return self._runner.forward_of(model)

    def angles_of(self, model: CausalLM) -> AngleSets:
        """See SwitchHost."""
        return KvPlan.of(model, self._engine.config, self._max_seq_len).angles

    def post(self, run: Callable[[], None], *, drains: bool, holds_after: bool = False) -> "Future[None]":
        """See SwitchHost: between two steps."""
        return self._engine.border.post(run, drains=drains, holds_after=holds_after)

    def withdraw(self, done: "Future[None]") -> bool:
        """See SwitchHost."""
        return self._engine.border.withdraw(done)

    def exchange(self, new: Weights, old: Weights) -> int:
        """See SwitchHost. The prefix cache is emptied."""
        num_running = recompute_running(self._engine)
        scheduler = self._engine.parts.scheduler
        scheduler.pool.renew(new.fingerprint)
        old.model, old.forward = self._runner.exchange(new.model, new.forward)
        assert new.angles is not None
        old.angles = scheduler.exchange_angles(new.angles)
        return num_running

    def take_out(self) -> None:
        """See SwitchHost."""
        self._runner.exchange(None, None)

    def fail(self) -> None:
        """See SwitchHost."""
        self._engine.is_failed = True


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
