"""Requests that cross the original length of a rope: recomputed once, and never given K of other angles."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from family_cases import CASES, LONG, hf_model
from tiny_llama import DictSource, full_logits

from serve_app.models.base import CausalLM
from serve_app.models.registry import find_family
from serve_app.options import EngineConfig
from tests.engine.tiny_engine import TinyEngine

ORIGINAL, VOCABULARY = 40, 512
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": ORIGINAL}),
    "dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            "max_position_embeddings": ORIGINAL,
        },
    ),
}
CONFIG = EngineConfig(
    max_seqs=6, max_batched_tokens=48, prefill_chunk_tokens=20, block_size=16, max_waiting=64, cuda_graphs=False
)


def ids(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=count)


def models(name: str) -> tuple[Any, CausalLM]:
    kind, changes = ROPES[name]
    CASES["here"] = (kind, {"vocab_size": VOCABULARY, "num_hidden_layers": 2} | changes)
    hf = hf_model("here")
    family = find_family(type(hf).__name__, "config.json")
    args: Any = replace(family.args.from_hf(hf.config.to_dict()), max_position_embeddings=4 * ORIGINAL)  # type: ignore[type-var]
    return hf, family.build(args, DictSource({k: v.detach() for k, v in hf.state_dict().items()}))


@pytest.fixture
def opened() -> Iterator[list[TinyEngine]]:
    engines: list[TinyEngine] = []
    yield engines
    for tiny in engines:
        tiny.close()


def is_likeliest(logits: torch.Tensor, token_id: int) -> bool:
    return bool(logits.max() - logits[token_id] <= 1e-4 * logits.abs().max())


@pytest.mark.parametrize("backend", ["auto", pytest.param("torch", marks=pytest.mark.nightly)])
def test_longrope_follows_the_length_as_transformers_does(backend: str, opened: list[TinyEngine]) -> None:
    hf, model = models("longrope")
    opened.append(TinyEngine(model, replace(CONFIG, attention_backend=backend), 40, 4 * ORIGINAL))
    tiny = opened[0]
    # Two cross in the same step, one later, one never does, one is long from the beginning on.
    prompts = {"a": ids(1, 30), "b": ids(2, 30), "c": ids(3, 25), "never": ids(4, 8), "long": ids(5, 55)}
    for name, prompt in prompts.items():
        tiny.add(name, prompt, max_tokens=20)
    outputs = tiny.run()
    for name, prompt in prompts.items():
        text = prompt + outputs[name, 0]
        assert len(outputs[name, 0]) == 20
        for end in range(len(prompt), len(text)):
            assert is_likeliest(hf(torch.tensor([text[:end]])).logits[0, -1], text[end]), (name, end)
    scheduler = tiny.engine.parts.scheduler
    assert (scheduler.num_outgrown, scheduler.num_preemptions) == (3, 0)
    # What goes on beyond the border is what a prompt that was long from the beginning on gets.
    tiny.add("fresh", prompts["a"] + outputs["a", 0][:15], max_tokens=5)
    assert tiny.run()["fresh", 0] == outputs["a", 0][15:]


@pytest.mark.parametrize("name", ROPES)
def test_prefixes_of_other_angles_are_not_found(name: str, opened: list[TinyEngine]) -> None:
    _, model = models(name)
    opened.append(TinyEngine(model, CONFIG, 40, 4 * ORIGINAL))
    tiny, text = opened[0], ids(6, 60)

    def cached(label: str, count: int) -> int:
        tiny.add(label, text[:count], max_tokens=1)
        tiny.run()
        return tiny.finishes[label, 0].usage.cached_tokens

    assert cached("short", 38) == 0
    assert cached("long", 58) == 0
    assert cached("short again", 36) == 32
    assert cached("long again", 58) == 48
    assert cached("longer", 60) == (48 if name == "longrope" else 0)


def test_choices_cross_the_border(opened: list[TinyEngine]) -> None:
    """Sampled choices, alone and in company, in a pool with room for few of them."""
    _, model = models("longrope")
    results = []
    for num_blocks, company in ((60, 0), (12, 3)):
        opened.append(TinyEngine(model, CONFIG, num_blocks, 4 * ORIGINAL))
        tiny = opened[-1]
        for i in range(company):
            tiny.add(f"company {i}", ids(10 + i, 20 + 9 * i), max_tokens=30)
        tiny.add("a", ids(7, 35), max_tokens=25, n=3, temperature=0.8)
        outputs = tiny.run()
        results.append([outputs["a", choice] for choice in range(3)])
        assert tiny.engine.parts.scheduler.num_outgrown >= 3
    assert results[0] == results[1]


def test_dynamic_keeps_the_base_of_the_prompt(opened: list[TinyEngine]) -> None:
    hf, model = models("dynamic")
    prompt = ids(8, 50)
    results = []
    for preempts in (False, True):
        opened.append(TinyEngine(model, CONFIG, 40, 4 * ORIGINAL))
        tiny = opened[-1]
        tiny.add("a", prompt, max_tokens=30)
        outputs: dict[tuple[str, int], list[int]] = {}
        for _ in range(10):
            tiny.step(outputs)
        scheduler = tiny.engine.parts.scheduler
        if preempts:
            scheduler.preempt(scheduler.running[0])
        rest = tiny.run()
        results.append(outputs["a", 0] + rest["a", 0])
        assert scheduler.num_outgrown == 0
    assert results[0] == results[1]
    assert is_likeliest(hf(torch.tensor([prompt])).logits[0, -1], results[0][0])


def test_dynamic_recomputes_an_answer_that_crosses_the_original_length_once(opened: list[TinyEngine]) -> None:
    hf, model = models("dynamic")
    opened.append(TinyEngine(model, CONFIG, 40, 4 * ORIGINAL))
    tiny, prompt = opened[0], ids(9, 30)
    tiny.add("a", prompt, max_tokens=40)
    text = prompt + tiny.run()["a", 0]
    assert tiny.engine.parts.scheduler.num_outgrown == 1
    for end in range(len(prompt), ORIGINAL + 1):
        assert is_likeliest(hf(torch.tensor([text[:end]])).logits[0, -1], text[end])
    # Beyond it by the angles of the longest that the request may become, as a text of that length has them.
    logits = full_logits(model, text)
    for end in range(ORIGINAL + 1, len(text)):
        assert is_likeliest(logits[end - 1], text[end])


def test_more_lengths_than_places_wait(opened: list[TinyEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.layers.rotary.NUM_PLACES", 2)
    _, model = models("dynamic")
    opened.append(TinyEngine(model, CONFIG, 60, 4 * ORIGINAL))
    tiny = opened[0]
    for i in range(5):
        tiny.add(str(i), ids(20 + i, 45 + i), max_tokens=4)
    outputs: dict[tuple[str, int], list[int]] = {}
    tiny.step(outputs)
    assert len(tiny.engine.parts.scheduler.running) == 2
    assert all(len(tokens) == 4 for tokens in tiny.run().values())
