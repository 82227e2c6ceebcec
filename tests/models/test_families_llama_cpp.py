"""Dense families against logits that llama.cpp computed from the same files (tests/data/families)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import full_logits

from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.options import ModelSource

DATA = Path(__file__).parents[1] / "data" / "families"
# llama.cpp looks GELU up in a table of float16.
GELU = ("gemma", "phi2", "starcoder2")
NAMES = sorted(path.stem for path in DATA.glob("*.gguf"))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_agrees(name: str, backend: str) -> None:
    golden = np.load(DATA / f"{name}.npz", allow_pickle=False)
    theirs = torch.from_numpy(golden["logits"])
    files = resolve(ModelSource(model=str(DATA / f"{name}.gguf"), max_seq_len=int(golden["context"])))
    loaded = load_model(files, dtype="f32", device="cpu", is_exact=True)
    ours = full_logits(loaded.model, golden["token_ids"].tolist(), backend)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.99
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).max() <= 1e-4
    tolerance = 1e-3 if name.startswith(GELU) else 1e-5
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_every_family_that_gguf_has_is_there() -> None:
    assert {name.split("-")[0] for name in NAMES} == {
        "llama", "llama3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi2", "phi3", "starcoder2", "granite"
    }  # fmt: skip
