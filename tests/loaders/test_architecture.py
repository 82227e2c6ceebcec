"""An architecture named by the user, and one that nobody knows but whose tensors somebody has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, SMALL, hf_model
from tiny_llama import full_logits

from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.check import check_model
from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.loaders.opening import find_args
from serve_app.models.registry import family_names, find_family, stored_name
from serve_app.options import ModelSource

Write = Callable[..., Path]
IDS = torch.randint(0, SMALL["vocab_size"], (12,), generator=torch.Generator().manual_seed(2)).tolist()
# Those of mistral.rs that are text models and served here, and our own.
NAMES = [
    "mistral", "gemma", "mixtral", "llama", "phi2", "phi3", "qwen2", "gemma2", "starcoder2", "phi3.5moe", "qwen3",
    "qwen3moe", "gemma3", "qwen2moe", "granite",
]  # fmt: skip


def renamed(folder: Path, architecture: str) -> Path:
    """The folder, its config.json saying another architecture."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))
    return folder


def check(path: Path, **options: Any) -> None:
    check_model(resolve(ModelSource(model=str(path), **options)))


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_is_the_same_family(name: str) -> None:
    assert name in family_names()
    config_name, gguf_name = stored_name(name, is_gguf=False), stored_name(name, is_gguf=True)
    assert find_family(name, "f") == find_family(config_name, "f")
    assert stored_name(config_name, is_gguf=True) == gguf_name
    assert config_name.endswith("ForCausalLM")
    if gguf_name != "llama":
        assert find_family(gguf_name, "f") == find_family(name, "f")


@pytest.mark.parametrize("arch", ["llama", "LlamaForCausalLM"])
def test_a_folder_read_as_named(arch: str, write_folder: Write) -> None:
    folder = write_folder(config={"architectures": ["YiForCausalLM"]})
    check(folder, arch=arch)
    files = resolve(ModelSource(model=str(folder), arch=arch))
    assert files.architecture == "LlamaForCausalLM"
    family, _ = find_args(files)
    assert family == find_family("llama", "f")


def test_the_named_one_wins_over_one_that_is_known(write_folder: Write) -> None:
    folder = write_folder()
    check(folder, arch="mistral")
    with pytest.raises(ModelFileError, match=r"tensor 'model\.layers\.0\.self_attn\.q_proj\.bias' is missing"):
        check(folder, arch="qwen2")


def test_a_gguf_read_as_named(write_gguf: Write) -> None:
    metadata = {"llama.rope.freq_base": 5000.0}
    path = write_gguf(metadata=metadata)
    foreign = path.with_name("foreign.gguf")
    foreign.write_bytes(path.read_bytes().replace(b"llama", b"yi34b"))
    with pytest.raises(
        ModelFileError, match=r"'yi34b' is not supported.* Its tensors are those of llama: try -a llama"
    ):
        check(foreign)
    assert find_args(resolve(ModelSource(model=str(foreign), arch="llama"))) == find_args(
        resolve(ModelSource(model=str(path)))
    )
    loaded = [
        load_model(resolve(ModelSource(model=str(p), arch="llama")), dtype="f32", device="cpu", is_exact=True)
        for p in (path, foreign)
    ]
    # q and k are stored in pairs under either name.
    ours, theirs = (full_logits(m.model, [i % 16 for i in IDS]) for m in loaded)
    assert torch.equal(ours, theirs)
    assert loaded[0].fingerprint == loaded[1].fingerprint


def test_a_name_without_family_lists_those_that_are_supported(write_folder: Write, write_gguf: Write) -> None:
    for path in (write_folder(), write_gguf()):
        with pytest.raises(
            LaunchError, match=r"--arch names 'deepseekv2', .* supported are llama \(LlamaForCausalLM\)"
        ):
            resolve(ModelSource(model=str(path), arch="deepseekv2"))


@pytest.mark.parametrize(
    ("case", "near"),
    [
        ("mistral", ["llama", "mistral", "granite"]),
        ("qwen2", ["qwen2"]),
        ("qwen3", ["qwen3"]),
        ("gemma2", ["gemma2"]),
        ("gemma3", ["gemma3"]),
        ("phi3", ["phi3"]),
        ("phi2", ["phi2"]),
        ("starcoder2", ["starcoder2"]),
    ],
)
def test_near_families_are_named(case: str, near: list[str], tmp_path: Path) -> None:
    hf_model(case).save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match=r"'SomethingForCausalLM' is not supported; supported are") as caught:
        check(renamed(tmp_path, "SomethingForCausalLM"))
    others = f" (the same tensors have {', '.join(near[1:])})" if near[1:] else ""
    assert str(caught.value).endswith(f". Its tensors are those of {near[0]}: try -a {near[0]}{others}")
    check(tmp_path, arch=near[0])


def test_none_is_named_where_tensors_differ(write_folder: Write, tensors: dict[str, Any]) -> None:
    norm = tensors["model.norm.weight"]
    for changes in ({"model.layers.0.extra_norm.weight": norm}, {"model.layers.0.mlp.up_proj.weight": None}):
        folder = write_folder(config={"architectures": ["NearForCausalLM"]}, tensors=changes)
        with pytest.raises(ModelFileError) as caught:
            check(folder)
        assert "try -a" not in str(caught.value)


def test_every_family_is_tried_by_its_own_name() -> None:
    kinds = {kind for kind, _ in CASES.values()}
    named = {stored_name(name, is_gguf=False).removesuffix("ForCausalLM") for name in family_names()}
    assert kinds <= named
