"""A real draft model behind the channel, in a replica's server without Ray."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.draft import DraftServer, build_model
from deployments.draft_plan import DraftPlan
from deployments.remote_proposer import RemoteProposer
from deployments.target import TargetServer
from serve_app.config import AppConfig
from serve_app.engine.speculation.draft_call import SampledTokens, SamplingChain
from serve_app.engine.speculation.draft_sampler import CANDIDATES
from serve_app.engine.speculation.proposer import DraftWish
from serve_app.errors import ModelFileError
from serve_app.options import EngineConfig, ModelSource, SpeculationOptions
from serve_app.text.tokenizer import open_tokenizer
from serve_app.text.vocabulary_digest import first_difference, vocabulary_digest, vocabulary_of
from tests.deployments.fakes import FakeEngine

DATA = Path(__file__).parents[1] / "data"
MODELS = DATA / "models"
PLAN = DraftPlan(
    ModelSource(model=str(MODELS / "stories40K-draft" / "hf"), dtype="f32"),
    ModelSource(model=str(MODELS / "stories260K" / "hf")),
    EngineConfig(max_seqs=8, block_size=16, device="cpu"),
)
OTHER = str(DATA / "tokenizers" / "llama2")
TOKENS = vocabulary_of(open_tokenizer(MODELS / "stories260K" / "hf"))


@pytest.fixture
def swapped(tmp_path: Path) -> str:
    """The draft's tokenizer with two ids swapped: another vocabulary, of which every id is one of the model's."""
    source = MODELS / "stories40K-draft" / "hf"
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (next(text for text, i in vocabulary.items() if i == number) for number in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(source / "tokenizer_config.json", tmp_path)
    return str(tmp_path)


@asynccontextmanager
async def opened(other_tokenizer: str | None) -> AsyncIterator[RemoteProposer]:
    """A channel to the draft, which maps text where it has another tokenizer."""
    plan, maps_text = PLAN, other_tokenizer is not None
    if maps_text:
        plan = replace(PLAN, source=replace(PLAN.source, tokenizer=other_tokenizer), maps_text=True)
    built = build_model(plan)
    server = DraftServer(built.model, built.vocabulary, "node", maps_text=maps_text)
    proposer = RemoteProposer(server, "target", "node", TOKENS, 1.0)
    async with asyncio.timeout(10):
        while not proposer.has_channel:
            await asyncio.sleep(0.005)
    try:
        yield proposer
    finally:
        proposer.close()
        await asyncio.to_thread(server.stop)


@pytest.mark.parametrize("maps_text", [False, True])
async def test_a_target_gets_the_drafts_continuation_and_is_spared_waiting_for_it(
    maps_text: bool, swapped: str
) -> None:
    golden = json.loads((MODELS / "stories40K-draft" / "golden.json").read_text())["cases"][0]
    expected = [1, *golden["draft_greedy_ids"]]
    async with opened(swapped if maps_text else None) as proposer:
        num_drafted = 0
        for known in range(1, 40, 5):
            text = expected[:known]
            [drafted] = await asyncio.to_thread(proposer.propose, [DraftWish(0, text, 1, 4)])
            if not maps_text:
                # Up to where the draft is in doubt.
                assert drafted == expected[known : known + len(drafted)]
            assert all(0 <= token_id < len(TOKENS) for token_id in drafted)
            num_drafted += len(drafted)
        assert num_drafted > 8
        assert proposer.counts.num_timeouts == 0
        await asyncio.to_thread(proposer.forget, 0)


@pytest.mark.parametrize("maps_text", [False, True])
async def test_sampled_tokens_come_with_their_chances_but_through_text(maps_text: bool, swapped: str) -> None:
    async with opened(swapped if maps_text else None) as proposer:
        text = [1]
        for _ in range(5):
            wishes = [DraftWish(0, text, 1, 4, SamplingChain(1.0)), DraftWish(1, [*text, 300], 1, 4)]
            drafted, greedy = await asyncio.to_thread(proposer.propose, wishes)
            assert isinstance(greedy, list)
            assert isinstance(drafted, SampledTokens) != maps_text
            if isinstance(drafted, SampledTokens):
                assert (len(drafted), drafted.candidates.shape) == (4, (4, CANDIDATES))
                assert drafted.chances.sum(axis=1) == pytest.approx(1, abs=1e-6)
                named = drafted.candidates == np.array(list(drafted))[:, None]
                assert (drafted.chances[named] > 0).tolist() == [True] * 4
            await asyncio.to_thread(proposer.forget, 1)
            text = [*text, *drafted[:2], 301]


def test_another_tokenizer_is_refused_with_the_first_id_that_differs() -> None:
    plan = replace(PLAN, source=replace(PLAN.source, tokenizer=OTHER))
    with pytest.raises(ModelFileError, match=r"another tokenizer: id 259 is .* to the target and .* to the draft"):
        build_model(plan)


def test_vocabularies_are_compared_by_what_ids_mean() -> None:
    assert first_difference([b"a", b"b"], [b"a", b"b"]) is None
    assert first_difference([b"a", b"b"], [b"a", b"c", b"d"]) == 1
    assert first_difference([b"a", b"b"], [b"a"]) == 1
    assert vocabulary_digest([b"ab", b"c"]) != vocabulary_digest([b"a", b"bc"])
    hf, gguf = (vocabulary_of(open_tokenizer(MODELS / "stories260K" / name)) for name in ("hf", "stories260K-F32.gguf"))
    assert vocabulary_digest(hf) == vocabulary_digest(gguf)


class Unreachable:
    """A draft replica that is not there yet."""

    async def open_channel(self, digest: bytes) -> Any:
        await asyncio.Event().wait()

    async def propose(self, client: str, calls: Any, ended: Any, limit_s: float) -> Any:
        raise AssertionError("nobody opened a way")


@pytest.mark.parametrize("has_draft", [False, True])
async def test_an_engine_is_told_how_to_speculate(has_draft: bool) -> None:
    engine = FakeEngine(lambda deltas: None)
    config = AppConfig.model_validate({"speculation": {"use": "auto", "max_tokens": 3}})
    draft = Unreachable() if has_draft else None
    target = TargetServer(config, "target", "node", lambda *_: engine, draft=draft)
    try:
        assert engine.speculation == (SpeculationOptions("auto", 3), target.draft)
        assert (target.draft is not None) == has_draft
    finally:
        target.stop()
