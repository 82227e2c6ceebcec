"""Token masks and aborted requests in a crowd that speculates: what is masked, and what goes on, says the same."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.engine.llm import LLM
from serve_app.engine.token_mask import TokenMask
from serve_app.messages import GenerateRequest, TokenDelta
from serve_app.options import DraftSampling, SamplingParams, Speculate, SpeculationOptions
from tests.engine.speculation.test_speculation import CONFIG, PAIRS, proposer_of


class Alternating:
    """Even ids, then odd ones, in turn; every fifth token is a digit's."""

    def __init__(self, digits: list[int], num_told: int) -> None:
        self._digits, self._num_told = digits, num_told

    def advance(self, token_id: int) -> None:
        assert token_id in self._allowed(512)
        self._num_told += 1

    def rollback(self, num_tokens: int) -> None:
        self._num_told -= num_tokens

    def fill(self, row: NDArray[np.int32]) -> None:
        row[:] = 0
        for token_id in self._allowed(32 * len(row)):
            row.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)

    def fork(self) -> TokenMask:
        return Alternating(self._digits, self._num_told)

    def _allowed(self, size: int) -> list[int]:
        if self._num_told % 5 == 4:
            return self._digits
        return list(range(3 + self._num_told % 2, size, 2))


def run(use: Speculate, draft_sampling: DraftSampling = "greedy") -> tuple[dict[str, list[int]], int]:
    """What 12 requests say, four of them masked; four others are aborted at different times. Where drafts are sampled
    there are no seeds."""
    said: dict[str, list[int]] = {}
    with LLM(str(PAIRS["stories260K"][0]), config=CONFIG) as llm:
        engine = llm.engine
        options = SpeculationOptions(use, 4, is_fixed=True, draft_sampling=draft_sampling)
        engine.speculate(options, proposer_of("stories260K", use))
        digits = [i for i in range(512) if llm.tokenizer.token_text(i).strip().isdigit()]
        assert len(digits) >= 10
        sampler: Any = engine.parts.runner.sampler
        set_row = sampler.set_row
        prompts = [llm.tokenizer.encode(f"Once upon a time {i}") for i in range(12)]

        def with_mask(row: int, params: SamplingParams, seed: int, prompt: Any, output: Any) -> None:
            mask = Alternating(digits, len(output)) if prompt in prompts[::3] else None
            set_row(row, params, seed, prompt, output, mask)

        sampler.set_row = with_mask
        for i, prompt in enumerate(prompts):
            seed = i if draft_sampling == "greedy" else None
            params = SamplingParams(temperature=i % 2 * 0.9, seed=seed, max_tokens=50, ignore_eos=True)
            engine.add(GenerateRequest(f"r{i}", prompt, params))
        for step in range(400):
            deltas: list[TokenDelta] = engine.step()
            for delta in deltas:
                said.setdefault(delta.request_id, []).extend(delta.token_ids)
            if step in (3, 5, 7, 9):
                engine.abort(f"r{1 + 3 * (step // 2 - 1)}")
            if not engine.has_requests:
                break
        pool = engine.parts.scheduler.pool
        assert pool.num_free == pool.num_total
        counts = engine.stats().speculation
    gone = {f"r{i}" for i in (1, 4, 7, 10)}
    return {name: ids for name, ids in said.items() if name not in gone}, sum(counts.accepted.values()) if counts else 0


@pytest.mark.parametrize("use", ["draft", "suffix"])
def test_texts_are_those_without(use: Speculate) -> None:
    plain, none = run("off")
    drafted, some = run(use)
    assert none == 0
    assert some > 20
    assert drafted == plain
    assert all(len(ids) == 50 for ids in plain.values())


def test_sampled_drafts_keep_to_the_masks() -> None:
    """A mask that is told of a token that it forbids raises. Greedy requests say what they do without drafts."""
    plain, _ = run("off", "sampled")
    drafted, accepted = run("draft", "sampled")
    assert accepted > 20
    assert drafted.keys() == plain.keys()
    assert all(len(ids) == 50 for ids in drafted.values())
    for name, ids in drafted.items():
        assert ids == plain[name] or int(name[1:]) % 2
