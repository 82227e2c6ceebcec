"""The weights of the trained models' GGUF files are those of their Hugging Face folders."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import serve_app
from serve_app.loaders import recode, weight_source
from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.loaders.name_map import gguf_name, half_split_order
from serve_app.loaders.opening import open_checkpoint
from serve_app.loaders.weight_source import CheckpointSource
from serve_app.options import ModelSource
from serve_app.quant.native_weight import NativeWeight
from serve_app.quant.packed import PackedWeight
from serve_app.quant.weight import DenseWeight

MODELS = Path(__file__).parents[1] / "data" / "models"
ASSETS = Path(serve_app.__file__).parent / "assets"
FILES = {
    "stories260K-F32": MODELS / "stories260K" / "stories260K-F32.gguf",
    "stories260K-F16": MODELS / "stories260K" / "stories260K-F16.gguf",
    "stories260K-Q4_0": MODELS / "stories260K" / "stories260K-Q4_0.gguf",
    "stories260K-Q8_0": ASSETS / "stories260K-Q8_0.gguf",
    "stories3M-F32": MODELS / "stories3M" / "stories3M-F32.gguf",
    "stories3M-Q4_K_M": MODELS / "stories3M" / "stories3M-Q4_K_M.gguf",
    "stories3M-Q8_0": ASSETS / "stories3M-Q8_0.gguf",
}
# Largest error of a weight, relative to the largest weight of its tensor.
TOLERANCES = {"F32": 0.0, "F16": 2**-11, "Q8_0": 0.005, "Q4_0": 0.125, "Q4_K_M": 0.09}
N_HEADS, N_KV_HEADS = 8, 4


def source_of(path: Path, dtype: torch.dtype = torch.float32) -> CheckpointSource:
    return CheckpointSource(open_checkpoint(resolve(ModelSource(model=str(path)))), dtype, torch.device("cpu"))


def reference(name: str) -> dict[str, Tensor]:
    return load_file(MODELS / name.split("-")[0] / "hf" / "model.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_weights_agree_with_the_folder(name: str) -> None:
    source = source_of(FILES[name])
    tolerance = TOLERANCES[name.split("-")[1]]
    for tensor_name, expected in reference(name).items():
        if expected.ndim == 1:
            assert torch.equal(source.tensor(tensor_name, tuple(expected.shape)), expected)
            continue
        weight = source.weight([tensor_name], [expected.shape[0]], expected.shape[1])
        error = (weight.dequantize() - expected).abs().max()
        assert error <= tolerance * expected.abs().max(), tensor_name


@pytest.mark.parametrize("name", FILES)
def test_packed_weights_are_exactly_those_of_the_gguf_package(name: str) -> None:
    source = source_of(FILES[name])
    oracle = {t.name: t for t in gguf.GGUFReader(FILES[name]).tensors}
    for tensor_name, like in reference(name).items():
        if like.ndim == 1:
            continue
        stored = oracle[gguf_name(tensor_name)]
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(stored.data, stored.tensor_type)))
        heads = {"q_proj": N_HEADS, "k_proj": N_KV_HEADS}.get(tensor_name.split(".")[-2])
        if heads is not None:
            expected = expected[half_split_order(len(expected), heads)]
        weight = source.weight([tensor_name], [like.shape[0]], like.shape[1])
        assert torch.equal(weight.dequantize(), expected), tensor_name


@pytest.mark.parametrize("path", [*FILES.values(), MODELS / "stories260K" / "hf"], ids=lambda p: p.name)
def test_models_load_and_use_every_tensor(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_model(resolve(ModelSource(model=str(path))), dtype="f32", device="cpu")
    assert loaded.model.args.vocab_size == 512
    assert not caplog.records


def test_without_native_kernels_weights_stay_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain weights of the compute dtype and packed ones are views of the mapping; the others are not."""
    monkeypatch.setattr(weight_source, "native_matrix", lambda *args: None)
    name, shape = "model.layers.0.mlp.down_proj.weight", ([256], 768)
    dense = source_of(FILES["stories3M-F32"]).weight([name], *shape)
    packed = source_of(FILES["stories3M-Q8_0"]).weight([name], *shape)
    converted = source_of(FILES["stories3M-F32"], torch.bfloat16).weight([name], *shape)
    assert isinstance(dense, DenseWeight)
    assert isinstance(packed, PackedWeight)
    assert isinstance(converted, DenseWeight)
    assert converted.dtype == torch.bfloat16
    mapped = mapped_ranges()
    assert is_mapped(dense.dequantize(), mapped)
    assert is_mapped(packed.blocks, mapped)
    assert not is_mapped(converted.dequantize(), mapped)


@pytest.mark.parametrize("pack_bytes", [1, 40000])
def test_matrices_are_packed_piece_by_piece(pack_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"]
    shapes = [([512], 256), ([128], 256)]
    whole = [source_of(FILES["stories3M-Q4_K_M"]).weight([n], *s) for n, s in zip(names, shapes, strict=True)]
    monkeypatch.setattr(recode, "PIECE_BYTES", pack_bytes)
    for name, shape, expected in zip(names, shapes, whole, strict=True):
        weight = source_of(FILES["stories3M-Q4_K_M"]).weight([name], *shape)
        assert isinstance(weight, NativeWeight)
        assert torch.equal(weight.matrix.unpack(), expected.matrix.unpack())


def mapped_ranges() -> list[tuple[int, int]]:
    """Address ranges of this process that map model files."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith((".gguf", ".safetensors"))]
    return [(int(begin, 16), int(end, 16)) for begin, end in ranges]


def is_mapped(tensor: Tensor, ranges: list[tuple[int, int]]) -> bool:
    return any(begin <= tensor.data_ptr() < end for begin, end in ranges)


def test_fused_weights_are_the_parts_one_below_the_other() -> None:
    source = source_of(FILES["stories3M-Q4_K_M"])
    names = [f"model.layers.3.self_attn.{p}_proj.weight" for p in "qkv"]
    fused = source.weight(names, [256, 128, 128], 256)
    parts = [source.weight([name], [rows], 256) for name, rows in zip(names, (256, 128, 128), strict=True)]
    expected = torch.cat([part.dequantize() for part in parts])
    assert fused.shape == (512, 256)
    assert torch.equal(fused.dequantize(), expected)
    x = torch.randn(3, 256)
    assert (fused.matmul(x) - x @ expected.T).abs().max() <= 0.02 * (x @ expected.T).abs().max()
