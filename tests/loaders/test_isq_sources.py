"""In-situ quantization of what there is besides Llama's folders: every family, GGML's container, other row orders."""

from pathlib import Path
from typing import Any

import pytest
from family_folders import folder_of
from ggml_writer import from_gguf

from serve_app.__main__ import main
from serve_app.loaders.check import check_model
from serve_app.loaders.load import LoadedModel, load_model
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.options import IsqOptions, ModelSource
from tests.loaded_weights import matrices, same

GGUF = Path(__file__).parents[1] / "data" / "models" / "stories3M" / "stories3M-F32.gguf"


def files(path: Path, isq: str | None = None, **options: Any) -> ModelFiles:
    return resolve(ModelSource(model=str(path), isq=None if isq is None else IsqOptions(type=isq), **options))


def load(path: Path, isq: str | None = None) -> LoadedModel:
    return load_model(files(path, isq), dtype="auto", device="cpu")


def quantised(source: Path, target: Path, isq: str) -> Path:
    assert main(["quantize", "-m", str(source), "--isq", isq, "-o", str(target)]) == 0
    return target


@pytest.mark.parametrize(
    "case", ["gemma2, long window", "gemma3, published pattern", "phi3, long", "phi2, grouped", "granite, biases",
             "starcoder2, window", "qwen3", "qwen3moe"],
)  # fmt: skip
def test_every_family_as_its_quantised_folder_and_gguf(case: str, tmp_path: Path) -> None:
    folder = folder_of(case, tmp_path / "hf")
    check_model(files(folder, "Q8_0"))
    ours = load(folder, "Q8_0")
    # Rows of 48 fall back to F16.
    assert {kind for kind, _ in matrices(ours.model).values()} & {"Q8_0", "F16"}
    assert same(ours.model, load(quantised(folder, tmp_path / "a", "Q8_0")).model)
    gguf = quantised(folder, tmp_path / "a.gguf", "F32")
    assert same(load(gguf, "Q8_0").model, load(quantised(gguf, tmp_path / "b.gguf", "Q8_0")).model)


@pytest.mark.parametrize("isq", ["Q4_K_M", "HQQ4"])
def test_a_ggufs_folder_is_what_it_becomes_at_load(isq: str, tmp_path: Path) -> None:
    assert same(load(GGUF, isq).model, load(quantised(GGUF, tmp_path / "a", isq)).model)


def test_ggmls_container(tmp_path: Path) -> None:
    path = from_gguf(GGUF, tmp_path / "model.bin")
    check_model(files(path, "Q4K"))
    assert same(load(path, "Q4K").model, load(quantised(path, tmp_path / "a", "Q4K")).model)
