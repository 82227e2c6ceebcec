"""Steps that begin before the last one's tokens are known: the same texts, whatever the requests ask for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import CASES, hf_model
from tiny_llama import DictSource

from serve_app.engine import model_runner
from serve_app.engine.llm import LLM, Generation
from serve_app.engine.sampler import Sampler
from serve_app.models.registry import find_family
from serve_app.options import DryParams, EngineConfig, SamplingParams
from tests.engine.test_angle_sets import ROPES
from tests.engine.tiny_engine import TinyEngine

MODEL = Path(__file__).parents[1] / "data" / "models" / "stories260K" / "stories260K-F32.gguf"
DRAWN = {"temperature": 0.9, "max_tokens": 40, "ignore_eos": True}
ASKED = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40),
    "drawn": SamplingParams(seed=1, top_k=40, top_p=0.9, **DRAWN),
    "penalties": SamplingParams(seed=2, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, **DRAWN),
    "repetitions": SamplingParams(temperature=0.0, max_tokens=60, dry=DryParams(multiplier=0.8, allowed_length=1)),
    "bias": SamplingParams(seed=3, logit_bias=((260, 3.0), (300, -9.0)), min_tokens=9, **DRAWN),
    "logprobs": SamplingParams(seed=4, logprobs=3, **DRAWN),
    "choices": SamplingParams(seed=5, n=3, **DRAWN),
    "a stop string": SamplingParams(seed=6, stop=("the", "a "), **DRAWN),
    "scores of the prompt": SamplingParams(seed=7, logprobs=2, prompt_logprobs=True, max_tokens=5),
    "one token": SamplingParams(seed=8, max_tokens=1),
}
PROMPTS = [
    "Once upon a time there was a girl who lived by the sea, and she had a boat",
    "Tim",
    "Once upon a time there was a girl who lived by the sea, and she had a dog. One day she saw a big",
]


def generate(config: EngineConfig) -> tuple[list[Generation], LLM]:
    with LLM(str(MODEL), dtype="f32", config=config) as llm:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(ASKED))]
        return llm.generate(prompts, list(ASKED.values())), llm


CONFIGS = {
    "roomy": EngineConfig(max_seqs=16, block_size=16, attention_backend="torch"),
    "two rows": EngineConfig(max_seqs=2, block_size=16, attention_backend="torch"),
    "small chunks": EngineConfig(
        max_seqs=16, block_size=16, attention_backend="torch", prefill_chunk_tokens=16, max_batched_tokens=32
    ),
    "few blocks": EngineConfig(max_seqs=16, block_size=16, attention_backend="torch", pool_tokens=16 * 14),
}


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether steps overlap on this machine's device too; sampling is plain torch's in both cases."""
    made = Sampler.__init__

    def torch_alone(self: Sampler, *args: object, **kwargs: object) -> None:
        made(self, *args, **kwargs, is_native=False)  # type: ignore[arg-type]

    monkeypatch.setattr(Sampler, "__init__", torch_alone)
    return lambda does: monkeypatch.setattr(model_runner, "OVERLAPPING", ("cpu",) if does else ())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_every_request_gets_what_it_gets_step_by_step(
    config: EngineConfig, overlapping: Callable[[bool], None]
) -> None:
    overlapping(False)
    plain, _ = generate(config)
    overlapping(True)
    overlapped, llm = generate(config)
    assert llm.engine.parts.runner.overlaps
    if config.pool_tokens:
        assert llm.engine.stats().preemptions > 0
    for name, theirs, ours in zip(ASKED, plain, overlapped, strict=True):
        for their, our in zip(theirs.choices, ours.choices, strict=True):
            assert our.token_ids == their.token_ids, name
            assert our.text == their.text, name
            assert our.finish is not None
            assert their.finish is not None
            assert (our.finish.reason, our.finish.stop_reason) == (their.finish.reason, their.finish.stop_reason), name
            for a, b in zip(our.logprobs or [], their.logprobs or [], strict=True):
                assert a.token_id == b.token_id
                np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-5)
        assert [p.token_id for p in ours.prompt_logprobs or []] == [p.token_id for p in theirs.prompt_logprobs or []]
        for a, b in zip(ours.prompt_logprobs or [], theirs.prompt_logprobs or [], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)


def test_the_option_turns_it_off(overlapping: Callable[[bool], None]) -> None:
    overlapping(True)
    _, llm = generate(EngineConfig(max_seqs=16, block_size=16, attention_backend="torch", overlap=False))
    assert not llm.engine.parts.runner.overlaps


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Mistral", {"sliding_window": 19}),
        ("Gemma2", {"sliding_window": 12, "head_dim": 16}),
        ROPES["longrope"],
        ROPES["dynamic"],
    ],
    ids=["a window", "two groups", "longrope", "dynamic"],
)
def test_windows_and_sets_of_angles(kind: str, changes: dict[str, Any], overlapping: Callable[[bool], None]) -> None:
    """Choices, chunks, a pause, preemptions, and requests that outgrow their angles."""
    CASES["here"] = (kind, {"vocab_size": 512, "num_hidden_layers": 2} | changes)
    hf = hf_model("here")
    family = find_family(type(hf).__name__, "config.json")
    args: Any = replace(family.args.from_hf(hf.config.to_dict()), max_position_embeddings=160)  # type: ignore[type-var]
    model = family.build(args, DictSource({k: v.detach() for k, v in hf.state_dict().items()}))
    config = EngineConfig(
        max_seqs=6, max_batched_tokens=40, prefill_chunk_tokens=24, block_size=16, attention_backend="torch"
    )
    said = []
    for does in (False, True):
        overlapping(does)
        tiny = TinyEngine(model, config, 40, 160, overlaps=does)
        prompt = list(range(20, 50))
        tiny.add("a", prompt, max_tokens=25)
        tiny.add("b", [*prompt, 60], max_tokens=25, n=2, temperature=0.9, top_k=20)
        tiny.add("long", list(range(100, 170)), max_tokens=10)
        outputs: dict[tuple[str, int], list[int]] = {}
        for i in range(12):
            tiny.step(outputs)
            if i == 4:
                tiny.engine.pause("a")
            if i == 7:
                scheduler = tiny.engine.parts.scheduler
                scheduler.preempt(scheduler.running[-1])
        tiny.engine.resume("a")
        for key, more in tiny.run().items():
            outputs.setdefault(key, []).extend(more)
        said.append(outputs)
        tiny.close()
    assert said[0] == said[1]
