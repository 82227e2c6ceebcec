"""Drafts in an engine's steps, right, wrong and half right: the texts are those without."""

import random
from pathlib import Path
from typing import Any

import pytest

from serve_app.engine.llm import LLM
from serve_app.options import DryParams, EngineConfig, SamplingParams

MODEL = Path(__file__).parents[2] / "data" / "models" / "stories260K" / "stories260K-F32.gguf"
CONFIG = EngineConfig(max_seqs=8, block_size=16, prefill_chunk_tokens=16, max_batched_tokens=64)
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 5, "top_k": 30},
    {"temperature": 1.0, "seed": 6, "frequency_penalty": 0.5, "logprobs": 2},
    {"temperature": 0.0, "dry": DryParams(multiplier=0.8), "logprobs": 1},
    {"temperature": 0.8, "seed": 7, "n": 2, "stop": ("little",)},
]
PROMPTS = ["Once upon a time there was", "The dog", "Lily went to the park and saw a big", "One day", "Tom and"]


def generate(plain: list[Any] | None) -> tuple[Any, int]:
    """Answers, and how many tokens were accepted; with the answers of another run, drafts are made of them."""
    chance, accepted = random.Random(1), [0]
    with LLM(str(MODEL), config=CONFIG) as llm:
        engine, params = llm.engine, [SamplingParams().with_overrides({"max_tokens": 60, **p}) for p in PARAMS]
        prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
        launch, finish = engine._launch, engine._finish

        def propose() -> bool:
            for request in engine._scheduler.running if plain is not None else ():
                i = prompts.index(request.token_ids[: request.num_prompt])
                said = plain[i].choices[request.choice].token_ids  # type: ignore[index]
                if request.num_pending == 1 and request.num_output:
                    draft = said[request.num_output : request.num_output + chance.randrange(6)]
                    request.draft = [token if chance.random() < 0.8 else 7 for token in draft]
            return launch()

        def count(request: Any) -> None:
            accepted[0] += request.num_accepted
            finish(request)

        engine._launch, engine._finish = propose, count  # type: ignore[method-assign]
        return llm.generate(prompts, params), accepted[0]


def test_texts_are_those_without_drafts() -> None:
    plain, none = generate(None)
    drafted, some = generate(plain)
    assert none == 0
    assert some > 100
    for a, b in zip(plain, drafted, strict=True):
        assert [c.token_ids for c in a.choices] == [c.token_ids for c in b.choices]
        assert [c.text for c in a.choices] == [c.text for c in b.choices]
        for x, y in zip(a.choices, b.choices, strict=True):
            assert [p.logprob for p in x.logprobs or ()] == pytest.approx([p.logprob for p in y.logprobs or ()])
