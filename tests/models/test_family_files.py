"""A family's GGUF file, in llama.cpp's layout, holds the same model as its SafeTensors folder."""

from pathlib import Path

import pytest
import torch
from family_cases import SMALL, hf_model
from family_gguf import write_gguf
from tiny_llama import full_logits

from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.options import ModelSource

IDS = torch.randint(0, SMALL["vocab_size"], (40,), generator=torch.Generator().manual_seed(2)).tolist()
# Case → GGUF's architecture.
FILES = {
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2, long window": "gemma2",
    "gemma3, published pattern": "gemma3",
    "phi3": "phi3",
    "phi3, window": "phi3",
    "phi3, long": "phi3",
    "phi2": "phi2",
    "granite": "granite",
    "starcoder2": "starcoder2",
}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", FILES)
def test_both_files_hold_the_same_model(
    name: str, backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf = hf_model(name)
    hf.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", FILES[name], hf)
    theirs = hf(torch.tensor([IDS])).logits[0]
    caplog.clear()
    logits = []
    for path in (tmp_path / "hf", tmp_path / "model.gguf"):
        loaded = load_model(resolve(ModelSource(model=str(path))), dtype="f32", device="cpu", is_exact=True)
        logits.append(full_logits(loaded.model, IDS, backend))
    assert not [record for record in caplog.records if "does not use" in record.message]
    assert (logits[0] - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert (logits[1] - logits[0]).abs().max() <= 1e-5 * logits[0].abs().max()
