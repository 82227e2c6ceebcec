"""With native kernels the engine steps without torch: no operator of it is in the loop."""

import pytest
from torch_operators import Operators

from serve_app.engine.llm import LLM
from serve_app.messages import GenerateRequest
from serve_app.options import DryParams, EngineConfig, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_k=40, top_p=0.9, seed=1, max_tokens=30, ignore_eos=True)
EVERYTHING = SamplingParams(
    repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1, dry=DryParams(multiplier=0.5),
    logit_bias=((5, 1.0),), min_tokens=50, logprobs=3, seed=2, max_tokens=60, ignore_eos=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "params", [[GREEDY], [DRAWN], [GREEDY, DRAWN, EVERYTHING] * 3], ids=["greedy", "drawn", "mixed"]
)
def test_a_step_of_the_whole_engine_runs_no_torch_operator(params: list[SamplingParams]) -> None:
    with LLM(config=EngineConfig(prefill_chunk_tokens=16)) as llm:
        prompt = llm.tokenizer.encode("Once upon a time there was a girl who lived by the sea and")
        engine = llm.engine
        for i, some in enumerate(params):
            engine.add(GenerateRequest(str(i), prompt, some))
        steps = 0
        with Operators() as operators:
            while engine.has_requests:
                assert all(d.finish is None or d.finish.error is None for d in engine.step())
                steps += 1
        assert steps > 30
        assert operators.names == []


def test_plain_torch_shows() -> None:
    with LLM(config=EngineConfig(attention_backend="torch")) as llm:
        llm.engine.add(GenerateRequest("a", [1, 2, 3], GREEDY))
        with Operators() as operators:
            llm.engine.step()
    assert len(operators.names) > 50
