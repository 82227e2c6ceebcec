"""A folder of any family becomes a GGUF that holds the same model, and a folder again."""

import json
from pathlib import Path
from typing import Any

import pytest
from family_folders import LLAMAS, MIXTURES, folder_of, some_ids, write_tokenizer
from tiny_llama import full_logits, hf_llama
from torch import Tensor

from serve_app.__main__ import main
from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.options import ModelSource
from serve_app.text.tokenizer import open_tokenizer

QUICK = [
    "llama, llama3",
    "llama, biases",
    "mistral",
    "qwen2, every head its own, yarn",
    "qwen3",
    "gemma, biases",
    "gemma2, long window",
    "gemma3, published pattern",
    "phi3, long",
    "phi2, grouped",
    "granite, biases",
    "starcoder2, window",
    *(case for case in MIXTURES if case != "phimoe"),
]
MORE = [
    *(case for case in LLAMAS if case not in QUICK),
    "llama yarn",
    "llama yarn, own magnitude",
    "llama dynamic",
    "qwen2, tied",
    "gemma",
    "phi3",
    "phi3, window",
    "phi3, short",
    "phi2",
    "starcoder2, no biases",
    "starcoder2, own head",
    "phimoe",
]


def logits(path: Path) -> Tensor:
    loaded = load_model(resolve(ModelSource(model=str(path))), dtype="f32", device="cpu", is_exact=True)
    found: Tensor = full_logits(loaded.model, some_ids(), "cpu")
    return found


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.nightly) for case in MORE)])
def test_gguf_and_folder_are_the_same_model(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(case, tmp_path / "hf")
    caplog.clear()
    assert main(["quantize", "-m", str(folder), "--isq", "F32", "-o", str(tmp_path / "a.gguf")]) == 0
    assert main(["quantize", "-m", str(tmp_path / "a.gguf"), "--isq", "F32", "-o", str(tmp_path / "back")]) == 0
    expected, *found = (logits(path) for path in (folder, tmp_path / "a.gguf", tmp_path / "back"))
    assert not [record for record in caplog.records if "not use" in record.message]
    for ours in found:
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_tokenizer_and_template_come_along(tmp_path: Path) -> None:
    folder = folder_of("qwen3", tmp_path / "hf")
    assert main(["quantize", "-m", str(folder), "--isq", "Q8_0", "-o", str(tmp_path / "a.gguf")]) == 0
    metadata = resolve(ModelSource(model=str(tmp_path / "a.gguf"))).gguf_metadata
    assert metadata is not None
    text = "Once upon a time, a <s> fox:  2+2={4}."
    assert open_tokenizer(metadata).encode(text) == open_tokenizer(folder).encode(text)
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)


@pytest.mark.parametrize(
    ("case", "changes", "argument"),
    [
        ("mistral, short window", {}, "windows"),
        ("qwen2, window", {}, "windows"),
        ("gemma2", {}, "query_pre_attn_scalar"),
        ("mistral, longrope", {}, "longrope"),
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "sparse"),
        ("phimoe", {"router_jitter_noise": 0.2}, "router_jitter_noise"),
    ],
)
def test_what_a_gguf_cannot_say_is_refused(
    case: str, changes: dict[str, Any], argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(case, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["quantize", "-m", str(folder), "--isq", "F32", "-o", str(tmp_path / "a.gguf")]) == 2
    assert argument in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_llama().save_pretrained(tmp_path / "hf")
    assert main(["quantize", "-m", str(tmp_path / "hf"), "--isq", "F32", "-o", str(tmp_path / "a.gguf")]) == 2
    assert "neither tokenizer.json nor tokenizer.model" in capsys.readouterr().err
    write_tokenizer(tmp_path / "hf")
    assert main(["quantize", "-m", str(tmp_path / "hf"), "--isq", "F32", "-o", str(tmp_path / "a.gguf")]) == 0
