"""Greedy texts of trained models, token for token, however the engine gets there.

The expected ids come from tests/data/models/*/golden_greedy.json, which other software computed (see there).
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from serve_app.engine.llm import LLM
from serve_app.options import EngineConfig, SamplingParams

MODELS = Path(__file__).parents[1] / "data" / "models"
SOURCES = [
    ("stories260K", "stories260K-F32.gguf"),
    ("stories260K", "stories260K-F16.gguf"),
    ("stories260K", "hf"),
    ("stories3M", "stories3M-F32.gguf"),
    ("stories3M", "hf"),
]
PLAIN = EngineConfig(max_seqs=32, block_size=16)

Case = tuple[list[int], list[int]]


def golden(model: str) -> list[Case]:
    cases = json.loads((MODELS / model / "golden_greedy.json").read_text())["cases"]
    return [(case["prompt_ids"], case.get("generated_ids") or case["greedy_ids"]) for case in cases]


def greedy(case: Case) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=len(case[1]))


@pytest.fixture(scope="module", params=SOURCES, ids="/".join)
def source(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def llm(source: tuple[str, str]) -> Iterator[LLM]:
    with LLM(str(MODELS / source[0] / source[1]), dtype="f32", config=PLAIN) as llm:
        yield llm


def check(llm: LLM, cases: list[Case], repeat: int = 1) -> None:
    many = cases * repeat
    results = llm.generate([case[0] for case in many], [greedy(case) for case in many])
    for result, case in zip(results, many, strict=True):
        assert result.token_ids == case[1]
    pool = llm.engine.parts.scheduler.pool
    assert pool.num_free == pool.num_total


def test_alone_and_again_from_the_prefix_cache(llm: LLM, source: tuple[str, str]) -> None:
    for case in golden(source[0]):
        check(llm, [case])
    longest = max(golden(source[0]), key=lambda case: len(case[0]) + len(case[1]))
    prompt = longest[0] + longest[1][:-8]
    again = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=8))[0]
    assert again.token_ids == longest[1][-8:]
    finish = again.choices[0].finish
    assert finish is not None
    assert finish.usage.cached_tokens >= len(prompt) - 1 - PLAIN.block_size


def test_many_at_once(llm: LLM, source: tuple[str, str]) -> None:
    cases = golden(source[0])
    check(llm, cases, repeat=-(-32 // len(cases)))


@pytest.mark.parametrize(
    "config",
    [
        replace(PLAIN, prefix_cache_n=0),
        replace(PLAIN, prefill_chunk_tokens=16, max_batched_tokens=48),
        replace(PLAIN, paged_attention=False),
    ],
    ids=["no prefix cache", "chunks of 16", "one contiguous range"],
)
def test_other_ways_to_compute(config: EngineConfig, source: tuple[str, str]) -> None:
    cases = golden(source[0])
    # Long prompts too, so that there is something to chunk.
    cases += [(prompt + output[:100], output[100:]) for prompt, output in cases if len(output) > 150]
    with LLM(str(MODELS / source[0] / source[1]), dtype="f32", config=config) as llm:
        check(llm, cases, repeat=2)


def test_forced_preemption(source: tuple[str, str]) -> None:
    cases = golden(source[0])
    config = replace(PLAIN, pool_tokens=400, prefix_cache_n=0)
    with LLM(str(MODELS / source[0] / source[1]), dtype="f32", config=config) as llm:
        check(llm, cases, repeat=2)
        assert llm.engine.stats().preemptions > 0
