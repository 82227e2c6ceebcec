"""Steps are measured without a trace, for one group of layers and for several."""

import pytest
from family_cases import CASES, hf_model, our_model

from serve_app.engine.speculation.step_timer import StepTimer
from serve_app.options import EngineConfig, SpeculationOptions
from tests.engine.tiny_engine import TinyEngine

CONFIG = EngineConfig(max_seqs=4, max_batched_tokens=40, prefill_chunk_tokens=24, block_size=16)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_a_measured_engine_says_what_any_other_does(kind: str) -> None:
    changes = {"sliding_window": 12, "head_dim": 16} if kind == "Gemma2" else {}
    CASES["here"] = (kind, {"vocab_size": 512, "num_hidden_layers": 2} | changes)
    model = our_model(hf_model("here"))
    said = []
    for is_measured in (False, True):
        tiny = TinyEngine(model, CONFIG, 30)
        if is_measured:
            batches = []
            execute = tiny.engine.parts.runner.execute

            def record(batch, execute=execute, batches=batches):  # type: ignore[no-untyped-def]
                batches.append((batch.num_requests, batch.num_tokens))
                return execute(batch)

            tiny.engine.parts.runner.execute = record  # type: ignore[method-assign]
            tiny.engine.speculate(SpeculationOptions("ngram", 4))
            assert batches[0] == (1, 1)
            assert {(1, 1), (1, 3), (1, 5), (2, 10), (4, 20)} <= set(batches)
            assert tiny.pool.num_free == 30
        tiny.add("a", list(range(20, 60)), max_tokens=20)
        tiny.add("b", list(range(20, 70)), max_tokens=20)
        said.append(tiny.run())
        tiny.close()
    assert said[0] == said[1]


def test_no_more_sequences_than_the_cache_has_blocks_for() -> None:
    CASES["here"] = ("Llama", {"vocab_size": 512, "num_hidden_layers": 2})
    tiny = TinyEngine(our_model(hf_model("here")), CONFIG, 5)
    timer = StepTimer(tiny.engine.parts)
    assert timer.most_sequences(16) == 5
    assert timer.most_sequences(17) == 2
    assert timer.measure(1, 5) > 0
    tiny.close()
