"""Mixtures against logits that llama.cpp computed from the same files (tests/data/mixtures)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mixtures import from_gguf
from tiny_llama import full_logits

DATA = Path(__file__).parents[1] / "data" / "mixtures"


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2moe", "qwen3moe"])
def test_llama_cpp_agrees(family: str, backend: str) -> None:
    golden = np.load(DATA / f"{family}.npz", allow_pickle=False)
    theirs = torch.from_numpy(golden["logits"])
    ours = full_logits(from_gguf(DATA / f"{family}.gguf"), golden["token_ids"].tolist(), backend)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.99
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).max() <= 1e-4
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
