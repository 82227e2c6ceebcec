"""The engine with a real model: what the offline face promises."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from serve_app.engine.engine import Engine
from serve_app.engine.llm import LLM
from serve_app.engine.speculation.local_proposer import LocalProposer
from serve_app.engine.speculation.proposer import Proposer
from serve_app.errors import ContextTooLong, LaunchError, ModelFileError
from serve_app.options import EngineConfig, ModelSource, SamplingParams, Speculate, SpeculationOptions

MODEL = Path(__file__).parents[1] / "data" / "models" / "stories260K" / "stories260K-F32.gguf"
DRAFT = MODEL.parents[1] / "stories40K-draft" / "hf"
OTHER_TOKENIZER = MODEL.parents[2] / "tokenizers" / "llama2"
SAMPLED = SamplingParams(temperature=1.0, seed=11, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(MODEL), dtype="f32", config=EngineConfig(block_size=16)) as llm:
        yield llm


def test_texts_and_ids_are_the_same_prompt(llm: LLM) -> None:
    text = "Once upon a time"
    by_text, by_ids = llm.generate([text, llm.tokenizer.encode(text)], SamplingParams(temperature=0, max_tokens=20))
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.prompt_ids[0] == llm.tokenizer.bos_id
    assert by_text.text == by_ids.text
    assert by_text.text.startswith(", there was a little girl")
    assert by_text.finish_reason == "length"


def test_a_seed_gives_the_same_text_in_any_company(llm: LLM) -> None:
    alone = llm.generate("Once", SAMPLED)[0]
    others = [SamplingParams(temperature=1.3, seed=i, max_tokens=10 + i) for i in range(31)]
    prompts = ["The cat " * (1 + i % 7) for i in range(31)]
    crowd = llm.generate([*prompts[:15], "Once", *prompts[15:]], [*others[:15], SAMPLED, *others[15:]])
    assert crowd[15].token_ids == alone.token_ids
    assert llm.generate("Once", SAMPLED.with_overrides({"seed": 12}))[0].token_ids != alone.token_ids


def test_without_a_seed_texts_differ(llm: LLM) -> None:
    free = SAMPLED.with_overrides({"seed": None})
    assert len({tuple(g.token_ids) for g in llm.generate(["Once"] * 6, free)}) == 6


def test_choices_differ_and_repeat_with_the_seed(llm: LLM) -> None:
    prompt = "One day, a cat named Tom went to the park with his friend"
    first, second = (llm.generate(prompt, SAMPLED.with_overrides({"n": 4}))[0] for _ in range(2))
    outputs = [tuple(choice.token_ids) for choice in first.choices]
    assert len(set(outputs)) == 4
    assert outputs == [tuple(choice.token_ids) for choice in second.choices]
    assert outputs[0] == tuple(llm.generate(prompt, SAMPLED)[0].token_ids)


def test_logprobs_are_those_of_the_raw_logits(llm: LLM) -> None:
    params = SAMPLED.with_overrides({"logprobs": 5, "temperature": 0.7, "prompt_logprobs": True})
    result = llm.generate("One day, a cat", params)[0]
    ids = result.prompt_ids + result.token_ids
    scores = torch.log_softmax(llm.logits(ids), dim=-1)
    assert result.logprobs is not None
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0].logprob is None
    described = result.prompt_logprobs[1:] + result.logprobs
    assert [p.token_id for p in described] == ids[1:]
    for position, p in enumerate(described):
        assert p.logprob == pytest.approx(scores[position, p.token_id].item(), abs=1e-4)
        best = scores[position].topk(5)
        assert [t for t, _ in p.top] == best.indices.tolist()
        assert [v for _, v in p.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert p.top_texts == [llm.tokenizer.token_text(t) for t, _ in p.top]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100, 511])
def test_logits_for_every_position(llm: LLM, length: int) -> None:
    ids = [1 + (i * 37) % 500 for i in range(length)]
    logits = llm.logits(ids)
    assert logits.shape == (length, 512)
    assert logits.dtype == torch.float32
    with LLM(str(MODEL), dtype="f32", config=EngineConfig(block_size=16, prefill_chunk_tokens=16)) as chunked:
        torch.testing.assert_close(chunked.logits(ids), logits, rtol=1e-5, atol=1e-5)


def test_more_prompts_than_the_queue_holds() -> None:
    with LLM(str(MODEL), dtype="f32", config=EngineConfig(max_seqs=2, max_waiting=3)) as llm:
        assert len(llm.generate(["Once"] * 20, SamplingParams(max_tokens=2))) == 20


def test_min_tokens_logit_bias_and_penalties_reach_the_sampler(llm: LLM) -> None:
    end = llm.tokenizer.bos_id or 0
    eager = SamplingParams(temperature=0, max_tokens=30, logit_bias=((end, 100.0),))
    assert llm.generate("Once", eager)[0].token_ids == [end]
    patient = llm.generate("Once", eager.with_overrides({"min_tokens": 9}))[0]
    assert len(patient.token_ids) == 10
    assert patient.token_ids[-1] == end
    banned = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, frequency_penalty=2.0, presence_penalty=2.0)
    plain = llm.generate("Once", banned.with_overrides({"frequency_penalty": 0.0, "presence_penalty": 0.0}))[0]
    assert len(set(llm.generate("Once", banned)[0].token_ids)) > len(set(plain.token_ids))


def test_a_failing_prompt_leaves_the_engine_usable(llm: LLM) -> None:
    with pytest.raises(ContextTooLong):
        llm.generate([[1], [1] * 600], SamplingParams(max_tokens=5))
    assert llm.engine.stats().num_running == 0
    assert len(llm.generate("Once", SAMPLED)[0].token_ids) == 40


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ModelFileError, match="no-such-model"):
        LLM("./no-such-model.gguf")


def test_close_gives_the_memory_back() -> None:
    llm = LLM(str(MODEL), config=EngineConfig(pool_mb=64))
    arena = llm.engine.parts.kv
    llm.close()
    assert arena.k == []


@pytest.mark.parametrize(("use", "draft"), [("draft", str(DRAFT)), ("suffix", None)])
def test_speculation_changes_no_text(llm: LLM, use: Speculate, draft: str | None) -> None:
    prompts = ["Once upon a time", "The cat"]
    speculation = SpeculationOptions(use=use, max_tokens=4, is_fixed=True)
    with LLM(
        str(MODEL), dtype="f32", config=EngineConfig(block_size=16), speculation=speculation, draft=draft
    ) as speculating:
        for _ in range(2):  # the index knows what it has read
            texts = [generation.token_ids for generation in speculating.generate(prompts, SAMPLED)]
            assert texts == [generation.token_ids for generation in llm.generate(prompts, SAMPLED)]
        counts = speculating.engine.stats().speculation
    assert counts is not None
    assert counts.accepted[use] > 10


def test_a_draft_alone_is_asked_as_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, type]] = []
    speculate = Engine.speculate

    def spy(engine: Engine, options: SpeculationOptions, draft: Proposer | None = None) -> None:
        told.append((options.use, type(draft)))
        speculate(engine, options, draft)

    monkeypatch.setattr(Engine, "speculate", spy)
    with LLM(str(MODEL), draft=str(DRAFT)) as llm:
        assert len(llm.generate("Once", SAMPLED)[0].token_ids) == 40
    with LLM(str(MODEL)):
        pass
    assert told == [("auto", LocalProposer), ("off", type(None))]


def test_a_draft_and_a_way_to_propose_that_do_not_go_together() -> None:
    with pytest.raises(LaunchError, match="'ngram', which asks no draft model"):
        LLM(str(MODEL), speculation=SpeculationOptions(use="ngram"), draft=str(DRAFT))
    with pytest.raises(LaunchError, match="no draft model is given"):
        LLM(str(MODEL), speculation=SpeculationOptions(use="draft"))
    with pytest.raises(ModelFileError, match="another tokenizer"):
        LLM(str(MODEL), draft=ModelSource(model=str(DRAFT), tokenizer=str(OTHER_TOKENIZER)))
