"""A draft model's thread, as a change of its weights sees it."""

from collections.abc import Callable
from concurrent.futures import Future

import torch

from serve_app.engine.forward import Forward
from serve_app.engine.kv_plan import KvPlan
from serve_app.engine.speculation.draft_border import DraftBorder
from serve_app.engine.speculation.drafter import Drafter
from serve_app.engine.switch_host import Weights
from serve_app.layers.angle_sets import AngleSets
from serve_app.models.base import CausalLM
from serve_app.options import EngineConfig


class DraftHost:
    """See SwitchHost. There is nothing to drain: no text depends on which weights proposed it."""

    def __init__(self, drafter: Drafter, border: DraftBorder, config: EngineConfig, max_seq_len: int) -> None:
        """config: of the drafter, with a device of torch's."""
        self._drafter = drafter
        self._border = border
        self._config = config
        self._max_seq_len = max_seq_len

    @property
    def device(self) -> str:
        """See SwitchHost."""
        return self._config.device

    @property
    def kv_dtype(self) -> torch.dtype:
        """See SwitchHost."""
        return self._drafter.kv_dtype

    @property
    def is_exact(self) -> bool:
        """See SwitchHost."""
        return self._config.cpu_exact

    @property
    def num_graphs(self) -> int:
        """See SwitchHost."""
        return self._drafter.num_graphs

    @property
    def is_gone(self) -> bool:
        """See SwitchHost."""
        return self._border.is_failed

    def forward_of(self, model: CausalLM) -> Forward:
        """See SwitchHost."""
        return self._drafter.forward_of(model)

    def angles_of(self, model: CausalLM) -> AngleSets:
        """See SwitchHost."""
        return KvPlan.of(model, self._config, self._max_seq_len).angles

    def post(self, run: Callable[[], None], *, drains: bool, holds_after: bool = False) -> "Future[None]":
        """See SwitchHost: between two calls. Until others are there a model without weights proposes nothing."""
        return self._border.between_calls(run)

    def withdraw(self, done: "Future[None]") -> bool:
        """See SwitchHost."""
        return done.cancel()

    def exchange(self, new: Weights, old: Weights) -> int:
        """See SwitchHost."""
        old.model, old.forward, old.angles = self._drafter.exchange(new.model, new.forward, new.angles)
        return self._drafter.num_sequences

    def take_out(self) -> None:
        """See SwitchHost."""
        self._drafter.exchange(None, None, None)

    def fail(self) -> None:
        """See SwitchHost."""
        self._border.fail()
