"""What `sirocco quantize` refuses, and what it leaves behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from family_folders import LLAMA3, folder_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llama import hf_llama
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from serve_app.__main__ import main
from serve_app.engine.llm import LLM
from serve_app.gguf_file import open_gguf

STORIES = Path(__file__).parents[1] / "data" / "models" / "stories3M"


def quantise(source: Path, target: Path, isq: str, *options: str) -> int:
    return main(["quantize", "-m", str(source), "--isq", isq, "-o", str(target), *options])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copied = tmp_path / "model"
    shutil.copytree(STORIES / "hf", copied)
    return copied


@pytest.mark.parametrize("spelling", ["model", "other/../model", "linked"])
def test_the_models_own_folder(
    spelling: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("other").mkdir()
    Path("linked").symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["quantize", "-m", str(folder), "--isq", "Q8_0", "-o", spelling]) == 2
    assert "names the model's own files" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_models_own_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(STORIES / "stories3M-Q4_0.gguf", tmp_path / "a.gguf")
    before = (tmp_path / "a.gguf").read_bytes()
    assert quantise(tmp_path / "a.gguf", tmp_path / "a.gguf", "Q8_0") == 2
    assert "names the model's own files" in capsys.readouterr().err
    assert (tmp_path / "a.gguf").read_bytes() == before


@pytest.mark.parametrize("target", ["a.gguf", "a"])
@pytest.mark.parametrize("kind", ["float8", "gptq"])
def test_weights_of_types_that_are_none(
    kind: str, target: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    weight = tensors.pop(f"{name}.weight")
    if kind == "float8":
        tensors[f"{name}.weight"] = weight.to(torch.float8_e4m3fn)
    else:
        tensors[f"{name}.qweight"] = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    assert quantise(folder, tmp_path / target, "Q8_0") == 2
    assert f"{name}.{'weight' if kind == 'float8' else 'qweight'}' has type" in capsys.readouterr().err
    assert not (tmp_path / target).exists()


def test_one_refused_type_of_several_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantise(STORIES / "hf", tmp_path / "a.gguf", "Q4K,HQQ4") == 2
    assert "HQQ4 cannot be written as .gguf" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_pure_q2_k_is_no_mix(tmp_path: Path) -> None:
    source = STORIES / "stories3M-F32.gguf"
    assert quantise(source, tmp_path / "a.gguf", "Q2_K", "--isq-organization", "pure") == 0
    with open_gguf(tmp_path / "a.gguf") as file:
        kinds = {info.type_id for info in file.tensors.values() if len(info.shape) == 2}
    assert kinds == {10}
    assert quantise(source, tmp_path / "b.gguf", "Q4_K_M", "--isq-organization", "pure") == 2


def test_an_index_of_an_earlier_model_goes(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    index = target / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    assert quantise(STORIES / "hf", target, "Q8_0") == 0
    assert not index.exists()
    with LLM(str(target)) as llm:
        assert torch.isfinite(llm.logits(llm.tokenizer.encode("Once"))).all()


def test_a_number_by_itself_is_copied(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.k_scale": torch.tensor(0.75)}, folder / "model.safetensors")
    assert quantise(folder, tmp_path / "out", "Q4_0") == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        scale = file.get_tensor("model.layers.0.self_attn.k_scale")
    assert scale.shape == ()
    assert scale == 0.75


def test_llama_3s_scaling_becomes_divisors(tmp_path: Path) -> None:
    folder = folder_of("llama, llama3", tmp_path / "hf")
    assert quantise(folder, tmp_path / "a.gguf", "F32") == 0
    config = hf_llama(rope_parameters=LLAMA3).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = config.hidden_size // config.num_attention_heads
    plain = 1.0 / LLAMA3["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    with open_gguf(tmp_path / "a.gguf") as file:
        divisors = file.data("rope_freqs.weight").view(np.float32).copy()
    np.testing.assert_allclose(divisors, (plain / scaled).numpy(), rtol=1e-5)
    assert divisors.max() == pytest.approx(8.0)
