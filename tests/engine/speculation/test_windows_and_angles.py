"""Drafts over blocks that are given up, and up to the length where a rope changes its angles."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from family_cases import CASES, hf_model
from tiny_llama import DictSource

from serve_app.engine.speculation.proposer import DraftWish, no_work
from serve_app.models.registry import find_family
from serve_app.options import EngineConfig, SpeculationOptions
from tests.engine.test_angle_sets import ROPES
from tests.engine.tiny_engine import TinyEngine

CONFIG = EngineConfig(max_seqs=6, max_batched_tokens=60, prefill_chunk_tokens=24, block_size=16)
KINDS = {
    "a window": ("Mistral", {"sliding_window": 19}),
    "two groups": ("Gemma2", {"sliding_window": 12, "head_dim": 16}),
    "longrope": ROPES["longrope"],
    "dynamic": ROPES["dynamic"],
}


class Oracle:
    """Proposes what the texts say, but for every seventh token."""

    name = "draft"
    is_open = True
    num_timeouts = 0

    def __init__(self, texts: Sequence[list[int]]) -> None:
        self.texts = texts

    def admit(self, sequence: int, token_ids: Sequence[int], scope: bytes = b"") -> None:
        """Knows all already."""

    def propose(self, wishes: Sequence[DraftWish], meanwhile: Callable[[], None] = no_work) -> list[list[int]]:
        return [self._propose(list(wish.token_ids), wish.max_tokens) for wish in wishes]

    def _propose(self, known: list[int], most: int) -> list[int]:
        text = next(text for text in self.texts if text[: len(known)] == known)
        return [0 if i % 7 == 0 else text[i] for i in range(len(known), min(len(text), len(known) + most))]

    def forget(self, sequence: int, token_ids: Sequence[int] = ()) -> None:
        """Goes on knowing."""

    def close(self) -> None:
        """Holds nothing."""


@pytest.mark.parametrize("name", KINDS)
def test_texts_are_those_without(name: str) -> None:
    kind, changes = KINDS[name]
    CASES["here"] = (kind, {"vocab_size": 512, "num_hidden_layers": 2} | changes)
    hf = hf_model("here")
    family = find_family(type(hf).__name__, "config.json")
    args: Any = replace(family.args.from_hf(hf.config.to_dict()), max_position_embeddings=160)  # type: ignore[type-var]
    model = family.build(args, DictSource({k: v.detach() for k, v in hf.state_dict().items()}))
    # All but the last cross the original length, of 40 tokens.
    prompts = {f"r{i}": list(range(20 * i + 3, 20 * i + 3 + length)) for i, length in enumerate((7, 20, 33, 39, 50))}
    said: list[dict[tuple[str, int], list[int]]] = []
    for is_drafted in (False, True):
        tiny = TinyEngine(model, CONFIG, 40, 160)
        if is_drafted:
            texts = [prompt + said[0][request, 0] for request, prompt in prompts.items()]
            tiny.engine.speculate(SpeculationOptions("draft", 6, is_fixed=True), Oracle(texts))
            tiny.most_drafted = 6
        for request, prompt in prompts.items():
            tiny.add(request, prompt, max_tokens=60)
        outputs: dict[tuple[str, int], list[int]] = {}
        for step in range(30):
            tiny.step(outputs)
            scheduler = tiny.engine.parts.scheduler
            if step % 10 == 9 and scheduler.running:
                scheduler.preempt(scheduler.running[-1])
        for key, more in tiny.run().items():
            outputs.setdefault(key, []).extend(more)
        said.append(outputs)
        counts = tiny.engine.stats().speculation
        tiny.close()
    assert said[0] == said[1]
    assert counts is not None
    assert counts.accepted["draft"] > 150
