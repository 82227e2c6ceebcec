"""What an engine is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve_app.batch import ForwardBatch
from serve_app.engine.batch_builder import BatchBuilder
from serve_app.engine.model_runner import StepResult
from serve_app.engine.outputs import OutputCollector
from serve_app.engine.request_factory import RequestFactory
from serve_app.engine.scheduler import Scheduler
from serve_app.kv_cache.kv_pool import KvPool
from serve_app.options import SamplingParams
from serve_app.text.tokenizer import Tokenizer


class SamplerRows(Protocol):
    """What the engine tells a sampler; see engine.sampler."""

    def set_row(
        self, row: int, params: SamplingParams, seed: int, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> None: ...
    def clear_row(self, row: int) -> None: ...


class Pending(Protocol):
    """A step under way; see engine.model_runner."""

    def wait(self) -> StepResult: ...


class Runner(Protocol):
    """What executes a step; see engine.model_runner. Benchmarks of the host side put a null one in its place."""

    @property
    def sampler(self) -> SamplerRows: ...
    @property
    def overlaps(self) -> bool: ...
    def execute(self, batch: ForwardBatch) -> Pending: ...


@dataclass(slots=True)
class EngineParts:
    """What an engine is made of; built by engine.build."""

    scheduler: Scheduler
    builder: BatchBuilder
    runner: Runner
    factory: RequestFactory
    collector: OutputCollector
    tokenizer: Tokenizer
    sampling_defaults: SamplingParams
    kv: KvPool

    def close(self) -> None:
        """Frees the cache; the model goes with its last user."""
        self.scheduler.pool.close()
        self.kv.close()
