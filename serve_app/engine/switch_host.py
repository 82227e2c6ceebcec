"""What runs a model whose weights change, as a ModelSwitch needs it: an engine, or a draft model's thread."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from serve_app.engine.forward import Forward
from serve_app.layers.angle_sets import AngleSets
from serve_app.models.base import CausalLM
from serve_app.options import IsqOptions


@dataclass(slots=True)
class Weights:
    """A model and what was made for it. model None: it is not in memory."""

    isq: IsqOptions | None
    fingerprint: bytes
    model: CausalLM | None = None
    forward: Forward | None = None
    angles: AngleSets | None = None


class SwitchHost(Protocol):
    """exchange and take_out are called only within what was posted, all else from any thread but the computing one."""

    @property
    def device(self) -> str:
        """Where the weights are."""

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the cache, which stays."""

    @property
    def is_exact(self) -> bool:
        """Native products take their input as it is."""

    @property
    def num_graphs(self) -> int:
        """CUDA graphs of the weights in use."""

    @property
    def is_gone(self) -> bool:
        """Whether nothing that is posted will run any more."""

    def forward_of(self, model: CausalLM) -> Forward:
        """How another model of the same shape is run over the same cache, recorded now."""

    def angles_of(self, model: CausalLM) -> AngleSets:
        """The rotary sets of another model."""

    def post(self, run: Callable[[], None], *, drains: bool, holds_after: bool = False) -> "Future[None]":
        """Has run called while nothing is computed; see Border."""

    def withdraw(self, done: "Future[None]") -> bool:
        """Takes back what was posted; False if it was run already."""

    def exchange(self, new: Weights, old: Weights) -> int:
        """Puts new weights in use, and those that were into old; returns how many texts are computed again."""

    def take_out(self) -> None:
        """Lets the weights in use go; nothing is computed until others are there."""

    def fail(self) -> None:
        """There are no weights any more, and will be none: another replica has to take the place of this one."""
