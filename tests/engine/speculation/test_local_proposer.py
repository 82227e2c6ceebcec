"""The whole pair in one process: what a target would get, step by step."""

import json
from pathlib import Path

import pytest

from serve_app.engine.speculation.build_drafter import build_drafter
from serve_app.engine.speculation.local_proposer import LocalProposer
from serve_app.engine.speculation.proposer import DraftWish, Proposer
from serve_app.options import EngineConfig, ModelSource

MODELS = Path(__file__).parents[2] / "data" / "models"
CONFIG = EngineConfig(max_seqs=8, block_size=16, device="cpu")


def accepted(proposer: Proposer, text: list[int], goal: list[int], count: int) -> list[int]:
    """Tokens that a greedy target accepts in each round, until too few of its goal are left for another."""
    text, rounds = list(text), []
    num_prompt = len(text)
    proposer.admit(3, text)
    while len(text) + count < len(goal):
        [drafted] = proposer.propose([DraftWish(3, text, num_prompt, count)])
        assert len(drafted) <= count
        agreeing = [a == b for a, b in zip(drafted, goal[len(text) :], strict=False)]
        num = agreeing.index(False) if False in agreeing else len(agreeing)
        rounds.append(num)
        text += goal[len(text) : len(text) + num + 1]
    return rounds


@pytest.mark.parametrize("case", [0, 1])
def test_the_real_pair_accepts_what_other_software_counted(case: int) -> None:
    expected = json.loads((MODELS / "stories40K-draft" / "golden.json").read_text())["cases"][case]
    target = json.loads((MODELS / "stories260K" / "golden_greedy.json").read_text())["cases"]
    [(prompt, ids)] = [(c["prompt_ids"], c["generated_ids"]) for c in target if c["prompt"] == expected["prompt"]]
    source = ModelSource(model=str(MODELS / "stories40K-draft" / "hf"), dtype="f32")
    proposer = LocalProposer(build_drafter(source, CONFIG, least_chance=0.0))
    rounds = accepted(proposer, prompt, [*prompt, *ids], 4)
    proposer.forget(3)
    proposer.close()
    known = expected["accepted_of_4_per_round"]
    num = min(len(rounds), len(known))
    assert num >= 15
    assert rounds[:num] == known[:num]
