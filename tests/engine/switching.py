"""Engines whose weights are changed while they work, and what a model says by itself."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve_app.engine.build import build_engine
from serve_app.engine.engine import Engine
from serve_app.engine.llm import LLM
from serve_app.engine.weight_switch import Mode, WeightSwitch
from serve_app.loaders.load import LoadedModel, load_model
from serve_app.loaders.model_files import ModelFiles
from serve_app.messages import GenerateRequest, TokenDelta
from serve_app.models.base import CausalLM
from serve_app.options import EngineConfig, IsqOptions, ModelSource, SamplingParams

MODELS = Path(__file__).parents[1] / "data" / "models" / "stories3M"
FILES = {name: MODELS / f"stories3M-{name}.gguf" for name in ("F32", "Q4_0", "Q6_K")}
"""Weights of the embedded model in other types, as llama-quantize made them; "none" is the embedded file itself."""

CONFIG = EngineConfig(max_seqs=32, block_size=16, prefill_chunk_tokens=32, max_batched_tokens=256, num_threads=1)


def load_other_file(files: ModelFiles, **options: Any) -> LoadedModel:
    """In place of load_model: the type that is asked for comes from a file that has it, not from a quantiser."""
    if files.isq is not None and files.isq.type is not None:
        files = replace(files, isq=None, weight_files=(FILES[files.isq.type],))
    return load_model(files, **options)


def request(name: str, prompt: list[int], **sampling: Any) -> GenerateRequest:
    params = SamplingParams().with_overrides({"max_tokens": 40, "ignore_eos": True, "temperature": 0.8, **sampling})
    return GenerateRequest(name, prompt, params)


class Served:
    """A running engine and what it said, by request and choice."""

    def __init__(self, config: EngineConfig = CONFIG, source: ModelSource | None = None) -> None:
        self.deltas: defaultdict[tuple[str, int], list[TokenDelta]] = defaultdict(list)
        self._lock = threading.Lock()
        self.engine: Engine = build_engine(source or ModelSource(), config, self._take)
        assert self.engine.switch is not None
        self.switch: WeightSwitch = self.engine.switch

    def _take(self, deltas: list[TokenDelta]) -> None:
        with self._lock:
            for delta in deltas:
                said = self.deltas[delta.request_id, delta.choice]
                assert delta.index == sum(len(d.token_ids) for d in said), "a gap"
                assert not said or said[-1].finish is None
                said.append(delta)

    def step(self, count: int = 1) -> None:
        """For an engine that was not started."""
        for _ in range(count):
            self._take(self.engine.step())

    def finish(self) -> None:
        """Steps until nothing is left."""
        while self.engine.has_requests:
            self.step()

    def ids(self, name: str, choice: int = 0) -> list[int]:
        return [i for delta in self.deltas[name, choice] for i in delta.token_ids]

    def text(self, name: str, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas[name, choice])

    def reasons(self) -> set[str]:
        """Why everything ended."""
        finishes = [deltas[-1].finish for deltas in self.deltas.values()]
        assert all(finish is not None for finish in finishes)
        return {finish.reason for finish in finishes if finish is not None}

    @contextmanager
    def switching(self, isq_type: str, mode: Mode) -> Iterator[threading.Thread]:
        """Prepared, and being switched by another thread; nothing settled."""
        self.switch.prepare(self.switch.plan(isq_type), lambda done: None)
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self.switch.switch(mode)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: self.engine.border.is_due or not thread.is_alive())
        yield thread
        thread.join(20)
        assert not thread.is_alive()
        if errors:
            raise errors[0]

    def close(self) -> None:
        pool = self.engine.parts.scheduler.pool
        if not self.engine.is_stopped and self.engine._thread is None:
            self.engine.abort_all()
            assert pool.num_free == pool.num_total
            pool.check()
        self.engine.stop()


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "waited too long"
        time.sleep(0.002)


class Plain:
    """What the weights of one type say, alone and undisturbed."""

    def __init__(self, file_type: str, isq: IsqOptions | None = None) -> None:
        file = FILES.get(file_type)
        self._llm = LLM(ModelSource(model=None if file is None else str(file), isq=isq), config=CONFIG)
        assert self._llm.engine.switch is not None
        self.isq_type = self._llm.engine.switch.isq_type

    @property
    def model(self) -> CausalLM:
        return self._llm.model

    def __call__(self, prompt: list[int], **sampling: Any) -> Any:
        return self._llm.generate([prompt], request("x", prompt, **sampling).sampling)[0].choices

    def all(self, sent: list[tuple[list[int], dict[str, Any]]]) -> list[Any]:
        """The first choice of each."""
        params = [request("x", prompt, **sampling).sampling for prompt, sampling in sent]
        return [found.choices[0] for found in self._llm.generate([prompt for prompt, _ in sent], params)]

    def prompt_logprobs(self, prompt: list[int], **sampling: Any) -> Any:
        return self._llm.generate([prompt], request("x", prompt, **sampling).sampling)[0].prompt_logprobs

    def encode(self, text: str) -> list[int]:
        return self._llm.tokenizer.encode(text)

    def close(self) -> None:
        self._llm.close()
