"""OpenVINO GenAI; runs in that package's environment, on a folder that optimum-cli has exported. See child_loop."""

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from child_loop import Cell, Clock, Figures, Measure, letters, serve, token_ids


class Ticks(genai.StreamerBase):
    """Marks the clock at the first token and at the last."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        """See StreamerBase."""
        self.clock.mark()
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """See StreamerBase."""


class OpenVino:
    """One pipeline."""

    def __init__(self, pipeline: genai.LLMPipeline, vocab_size: int) -> None:
        self._pipeline = pipeline
        self._vocab_size = vocab_size

    def measure(self, cell: Cell) -> Figures:
        """See child_loop."""
        config = genai.GenerationConfig(
            max_new_tokens=cell["new"] + 1, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        if cell["kind"] == "batch":
            return self._batch(cell, config)
        ids = token_ids(max(1, cell["prompt"]), self._vocab_size, cell["seed"])
        inputs = ov.Tensor(np.array([ids], dtype=np.int64))
        if cell["kind"] == "prefill":
            clock = Clock()
            clock.mark()
            metrics = self._pipeline.generate(inputs, config).perf_metrics
            clock.mark()
            return {**clock.figures(cell["prompt"]), "seconds": metrics.get_ttft().mean / 1e3}
        ticks = Ticks()
        self._pipeline.generate(inputs, config, ticks)
        return ticks.clock.figures(cell["new"])

    def _batch(self, cell: Cell, config: genai.GenerationConfig) -> Figures:
        """Several prompts are only taken as texts."""
        texts = [letters(cell["prompt"], cell["seed"] + i) for i in range(cell["streams"])]
        metrics = self._pipeline.generate(texts, config).perf_metrics
        seconds = (metrics.get_generate_duration().mean - metrics.get_ttft().mean) / 1e3
        return {"tokens": cell["streams"] * cell["new"], "seconds": seconds, "cpu_s": None}


def load(options: dict[str, Any]) -> tuple[Measure, dict[str, Any]]:
    """options: model, threads, kv, vocab_size."""
    properties = {"INFERENCE_NUM_THREADS": options["threads"], "KV_CACHE_PRECISION": options["kv"]}
    pipeline = genai.LLMPipeline(options["model"], "CPU", **properties)
    facts = {"version": genai.get_version(), "kv": options["kv"]}
    return OpenVino(pipeline, options["vocab_size"]).measure, facts


if __name__ == "__main__":
    serve(load)
