"""Every dense family against transformers, and against itself however a prompt is cut."""

import pytest
import torch
from family_cases import CASES, SMALL, hf_model, our_model
from tiny_llama import Piece, TinyPool, full_logits, step_logits

LENGTH = 75
IDS = torch.randint(0, SMALL["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
# One of each family, the one with the most of its parts.
FULLEST = [
    "mistral, short window",
    "qwen2, window",
    "qwen3, window, biases",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3, long",
    "phi2",
    "granite",
    "starcoder2, window",
]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str) -> None:
    hf = hf_model(name)
    model = our_model(hf)
    theirs = hf(torch.tensor([IDS])).logits[0]
    for backend in ("cpu", "torch"):
        ours = full_logits(model, IDS, backend)
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), backend


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", FULLEST)
def test_chunks_decoding_and_company_give_the_logits_of_one_pass(name: str, backend: str) -> None:
    model = our_model(hf_model(name))
    whole = full_logits(model, IDS, backend)
    pool = TinyPool(model.args, 12, 16)
    mine, others = range(6), range(6, 12)
    rows = []
    for start, stop in [(0, 30), (30, 31), (31, 60), (60, 74), (74, 75)]:
        pieces = [Piece(IDS, start, stop, mine), Piece(IDS[::-1], start // 2, (stop + 1) // 2, others)]
        pieces = pieces if (start // 2) < (stop + 1) // 2 else pieces[:1]
        rows.append(step_logits(model, pool, pieces, backend)[0])
    assert (torch.cat(rows) - whole).abs().max() <= 1e-5 * whole.abs().max()
