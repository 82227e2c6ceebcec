"""How many tokens a verify step gives for real pairs of models, as their golden files say: 4 drafted, greedy."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve_app.engine.llm import LLM
from serve_app.engine.speculation.build_drafter import build_drafter
from serve_app.engine.speculation.local_proposer import LocalProposer
from serve_app.options import EngineConfig, ModelSource, SamplingParams, SpeculationOptions

MODELS = Path(__file__).parents[2] / "data" / "models"
CONFIG = EngineConfig(max_seqs=1, block_size=16, device="cpu")


@dataclass(frozen=True, slots=True)
class Case:
    """num_tokens: of the golden run; tokens_a_step: of these for each of its passes of the target."""

    target: str
    draft: str
    prompt: str
    num_tokens: int
    tokens_a_step: float


def cases() -> list[Case]:
    """Of both pairs."""
    found = []
    for case in json.loads((MODELS / "stories40K-draft" / "golden.json").read_text())["cases"]:
        accepted, mean = case["accepted_of_4_per_round"], case["mean_tokens_per_target_call"]
        found.append(Case("stories260K", "stories40K-draft", case["prompt"], sum(accepted) + len(accepted), mean))
    for case in json.loads((MODELS / "stories3M" / "golden_greedy.json").read_text())["cases"]:
        mean = case["draft_tokens_per_pass_k4"]
        found.append(Case("stories3M", "stories260K", case["prompt"], len(case["greedy_ids"]), mean))
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.target}-{case.prompt or 'nothing'}")
def test_tokens_of_a_verify_step(case: Case) -> None:
    with LLM(str(MODELS / case.target / "hf"), dtype="f32", config=CONFIG) as llm:
        source = ModelSource(model=str(MODELS / case.draft / "hf"), dtype="f32")
        draft = LocalProposer(build_drafter(source, CONFIG, least_chance=0.0))
        llm.engine.speculate(SpeculationOptions("draft", 4, is_fixed=True), draft)
        sampling = SamplingParams(temperature=0.0, max_tokens=case.num_tokens, ignore_eos=True)
        prompt_ids = llm.tokenizer.encode(case.prompt) if case.prompt else [1]
        llm.generate([prompt_ids], sampling)
        counts = llm.engine.stats().speculation
        draft.close()
    assert counts is not None
    assert counts.tokens / counts.steps == pytest.approx(case.tokens_a_step, rel=0.05)
