"""Sirocco's engine, alone in a process: no Ray, no HTTP. See child_loop."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from child_loop import Cell, Clock, Figures, Measure, serve, token_ids

from kernels.cpu._native import ReadProbe
from serve_app import __version__
from serve_app.engine.start import start_engine
from serve_app.messages import GenerateRequest
from serve_app.options import EngineConfig, ModelSource, SamplingParams

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine

_MIN_READ_BYTES, _MAX_READ_BYTES = 64 << 20, 1 << 30


class Sirocco:
    """One engine, stepped by the measurement itself. Prompts behind which is decoded stay in the prefix cache."""

    def __init__(self, engine: "Engine", vocab_size: int, threads: int, read_bytes: int) -> None:
        self._engine = engine
        self._threads = threads
        self._read_bytes = read_bytes
        self._vocab_size = vocab_size
        self._num_requests = 0

    def measure(self, cell: Cell) -> Figures:
        """See child_loop."""
        clock = Clock()
        streams, new = cell["streams"], cell["new"]
        if cell["kind"] == "prefill":
            self._add(cell["prompt"], 1, cell["seed"])
            clock.mark()
            self._run(1)
            clock.mark()
            return clock.figures(cell["prompt"])
        if cell["kind"] == "serve":
            clock.mark()
            for stream in range(streams):
                self._add(cell["prompt"], new, cell["seed"] + stream)
            self._run(streams * new)
            clock.mark()
            return clock.figures(streams * new)
        # The same prompt each time at a depth, other ones in a batch; the first token comes with the prompt.
        first_seed = 0 if cell["kind"] == "decode" else cell["seed"]
        for stream in range(streams):
            self._add(max(1, cell["prompt"]), new + 1, first_seed + stream)
        self._run(streams)
        if cell["kind"] == "share":
            return self._run_reading(new)
        clock.mark()
        self._run(streams * new)
        clock.mark()
        return clock.figures(streams * new)

    def _run_reading(self, steps: int) -> Figures:
        """Steps of one stream, a pass of reading behind each; of two passes, since the first may meet busy threads."""
        reader = ReadProbe(self._read_bytes, self._threads)
        seconds, used, inverse = 0.0, 0.0, 0.0
        for _ in range(steps):
            clock = Clock()
            clock.mark()
            self._run(1)
            clock.mark()
            figures = clock.figures(1)
            seconds, used = seconds + figures["seconds"], used + figures["cpu_s"]
            inverse += 1 / reader.rates(2)[1]
        return {"tokens": steps, "seconds": seconds, "cpu_s": used, "read_rate": steps / inverse}

    def _add(self, prompt: int, new: int, seed: int) -> None:
        self._num_requests += 1
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        ids = token_ids(prompt, self._vocab_size, seed)
        self._engine.add(GenerateRequest(f"cell-{self._num_requests}", ids, params))

    def _run(self, tokens: int) -> None:
        """Steps until exactly so many tokens have come."""
        while tokens:
            for delta in self._engine.step():
                if delta.finish is not None and delta.finish.error is not None:
                    raise delta.finish.error
                tokens -= len(delta.token_ids)
            assert tokens >= 0, "the streams did not start in one step"


def load(options: dict[str, Any]) -> tuple[Measure, dict[str, Any]]:
    """options: model, threads, kv, context (tokens of the longest request), pool_tokens, streams."""
    config = EngineConfig(
        max_seqs=options["streams"],
        pool_tokens=options["pool_tokens"],
        num_threads=options["threads"],
        kv_cache_dtype=options["kv"],
    )
    engine = start_engine(
        ModelSource(model=options["model"], max_seq_len=options["context"]), config, lambda deltas: None
    )
    from kernels import dispatch
    from serve_app.kv_cache.kv_pool import kv_dtype_name

    facts = {"version": __version__, "kernels": dispatch.native().reason, "kv": kv_dtype_name(engine.parts.kv.dtype)}
    # A pass shall take about as long as a step.
    read_bytes = min(max(Path(options["model"]).stat().st_size, _MIN_READ_BYTES), _MAX_READ_BYTES)
    sirocco = Sirocco(engine, engine.parts.tokenizer.vocab_size, options["threads"], read_bytes)
    return sirocco.measure, facts


if __name__ == "__main__":
    serve(load)
