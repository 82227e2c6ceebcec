"""Whole models from files with something wrong end in one sentence; good ones in a model with a fingerprint."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import dispatch
from serve_app.errors import ModelFileError
from serve_app.loaders.load import LoadedModel, load_model
from serve_app.loaders.model_files import resolve
from serve_app.loaders.number_formats import compute_dtype, kv_dtype
from serve_app.loaders.opening import open_checkpoint
from serve_app.options import DType, KvDType, ModelSource

Write = Callable[..., Path]


def load(path: Path, dtype: DType = "f32") -> LoadedModel:
    return load_model(resolve(ModelSource(model=str(path))), dtype=dtype, device="cpu")


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("quantise", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "MXFP4"])
def test_gguf_loads_in_every_dtype(write_gguf: Write, quantise: str) -> None:
    path = write_gguf(quantise)
    for option, dtype in [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)]:
        loaded = load(path, option)  # type: ignore[arg-type]
        # The native kernels compute in float32; the option says what keys and values are kept in.
        assert (loaded.compute_dtype, loaded.kv_dtype) == (torch.float32, dtype)
        assert loaded.model.args.hidden_size == 32
        assert len(loaded.fingerprint) == 16


def load_e4m3(path: Path) -> LoadedModel:
    return load_model(resolve(ModelSource(model=str(path))), dtype="f32", device="cpu", kv="f8e4m3")


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale")], ids=" ".join)
def test_scales_of_an_e4m3_cache(write_folder: Write, names: tuple[str, str]) -> None:
    k_name, v_name = (f"model.layers.0.self_attn.{name}" for name in names)
    path = write_folder(tensors={k_name: floats(1) * 0.25, v_name: np.array([0.5, 2.0], np.float32)})
    loaded = load_e4m3(path)
    assert loaded.kv_dtype == torch.float8_e4m3fn
    assert loaded.kv_scales is not None
    assert [scale.tolist() for scales in loaded.kv_scales for scale in scales] == [[0.25, 0.25], [0.5, 2.0]]
    assert load(path).kv_scales is None


def test_an_e4m3_cache_without_scales(write_folder: Write, write_gguf: Write) -> None:
    assert load_e4m3(write_folder()).kv_scales is None
    assert load_e4m3(write_gguf("Q8_0")).kv_scales is None


@pytest.mark.parametrize("bad", [None, floats(3), floats(1) * 0.0, floats(1) * np.nan], ids=["none", "3", "0", "NaN"])
def test_scales_that_do_not_do_are_named(write_folder: Write, bad: np.ndarray | None) -> None:
    k_name, v_name = (f"model.layers.0.self_attn.{name}" for name in ("k_scale", "v_scale"))
    with pytest.raises(ModelFileError, match="v_scale"):
        load_e4m3(write_folder(tensors={k_name: floats(1), v_name: bad}))


def test_head_may_be_tied(write_gguf: Write, write_folder: Write) -> None:
    load(write_gguf(tensors={"output.weight": None}))
    load(write_folder(config={"tie_word_embeddings": True}, tensors={"lm_head.weight": None}))


def test_a_split_gguf_by_any_of_its_names(write_gguf: Write) -> None:
    whole = load(write_gguf("Q8_0"))
    folder = write_gguf("Q8_0", name="split/m.gguf", tensors_per_shard=5).parent
    shards = sorted(p.name for p in folder.iterdir())
    assert shards == [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for source in [
        ModelSource(model=str(folder)),
        ModelSource(model=str(folder / shards[1])),
        ModelSource(model=str(folder), files=("m-*",)),
        ModelSource(model=str(folder), files=tuple(reversed(shards))),
    ]:
        files = resolve(source)
        assert [p.name for p in files.weight_files] == shards
        assert files.model_name == "m"
        assert load_model(files, dtype="f32", device="cpu").fingerprint == whole.fingerprint
    (folder / shards[2]).unlink()
    for source in [ModelSource(model=str(folder)), ModelSource(model=str(folder / shards[0]))]:
        with pytest.raises(ModelFileError, match=shards[2]):
            resolve(source)


def test_gguf_version_2(write_gguf: Write) -> None:
    path = write_gguf("Q8_0")
    expected = load(path).fingerprint
    data = bytearray(path.read_bytes())
    assert data[4] == 3
    data[4] = 2
    older = path.with_name("older.gguf")
    older.write_bytes(data)
    assert load(older).fingerprint == expected


GGUF_MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "missing tensor": (
        {"tensors": {"blk.0.ffn_up.weight": None}}, "tensor 'blk.0.ffn_up.weight' is missing"),
    "missing norm": (
        {"tensors": {"output_norm.weight": None}}, "tensor 'output_norm.weight' is missing"),
    "missing layer": (
        {"metadata": {"llama.block_count": 2}}, "tensor 'blk.1.attn_norm.weight' is missing"),
    "misshapen matrix": (
        {"tensors": {"blk.0.attn_v.weight": floats(16, 64)}},
        r"tensor 'blk.0.attn_v.weight' has shape \[16, 64\], the model needs \[16, 32\]"),
    "misshapen norm": (
        {"tensors": {"blk.0.ffn_norm.weight": floats(31)}},
        r"tensor 'blk.0.ffn_norm.weight' has shape \[31\], the model needs \[32\]"),
    "vector for a matrix": (
        {"tensors": {"token_embd.weight": floats(512)}}, r"tensor 'token_embd.weight' has shape \[512\]"),
    "integers for a matrix": (
        {"tensors": {"blk.0.ffn_up.weight": np.ones((64, 32), np.int32)}},
        "tensor 'blk.0.ffn_up.weight' has type I32, which cannot be a weight"),
    "unknown architecture": (
        {"arch": "hyena", "metadata": {"hyena.context_length": 64}}, "architecture 'hyena' is not supported"),
    "no head count": (
        {"metadata": {"llama.attention.head_count": None}}, "llama.attention.head_count"),
    "odd head": (
        {"metadata": {"llama.attention.head_count": 7}}, "head"),
    "no context": (
        {"metadata": {"llama.context_length": None}}, "key 'llama.context_length' is missing"),
    "absurd context": (
        {"metadata": {"llama.context_length": 0}}, "key 'llama.context_length' is missing or no context length"),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUF_MISFITS)
def test_a_gguf_that_does_not_fit_is_refused(case: str, write_gguf: Write) -> None:
    changes, expected = GGUF_MISFITS[case]
    path = write_gguf(**changes)
    with pytest.raises(ModelFileError, match=expected) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


FOLDER_MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "missing tensor": (
        {"tensors": {"model.layers.0.mlp.up_proj.weight": None}},
        "model.safetensors: tensor 'model.layers.0.mlp.up_proj.weight' is missing"),
    "misshapen tensor": (
        {"tensors": {"lm_head.weight": floats(15, 32)}},
        r"model.safetensors: tensor 'lm_head.weight' has shape \[15, 32\], the model needs \[16, 32\]"),
    "integers": (
        {"tensors": {"lm_head.weight": np.ones((16, 32), np.int8)}},
        "model.safetensors: tensor 'lm_head.weight' has type I8"),
    "unknown architecture": (
        {"config": {"architectures": ["HyenaForCausalLM"]}},
        "config.json: architecture 'HyenaForCausalLM' is not supported; supported are .*LlamaForCausalLM"),
    "no architecture": ({"config": {"architectures": None}}, "config.json: key 'architectures' is missing"),
    "no width": ({"config": {"hidden_size": None}}, "config.json: .*hidden_size"),
    "context is text": (
        {"config": {"max_position_embeddings": "64"}}, "config.json: key 'max_position_embeddings' is missing or no"),
    "end is text": ({"config": {"eos_token_id": "</s>"}}, "config.json: key 'eos_token_id' is no token id"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDER_MISFITS)
def test_a_folder_that_does_not_fit_is_refused(case: str, write_folder: Write) -> None:
    changes, expected = FOLDER_MISFITS[case]
    folder = write_folder(**changes)
    with pytest.raises(ModelFileError, match=expected) as caught:
        load(folder)
    assert str(caught.value).startswith(str(folder))


def test_a_truncated_gguf_is_refused(write_gguf: Write) -> None:
    path = write_gguf()
    for size in (3, 20, 300, path.stat().st_size - 64):
        data = path.read_bytes()[:size]
        short = path.with_name("short.gguf")
        short.write_bytes(data)
        with pytest.raises(ModelFileError, match=r"short\.gguf"):
            load(short)


def test_tensors_that_nothing_reads_are_logged(write_folder: Write, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tensors={"model.layers.7.input_layernorm.weight": floats(32)})
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "tensors that the model does not use: model.layers.7.input_layernorm.weight" in caplog.text


def test_fingerprint_is_of_content_and_not_of_place(write_gguf: Write, tmp_path: Path) -> None:
    path = write_gguf()
    copy = tmp_path / "copy.gguf"
    shutil.copy(path, copy)
    original = load(path).fingerprint
    assert load(copy).fingerprint == original


def test_fingerprint_tells_models_apart(write_gguf: Write, tensors: dict[str, np.ndarray]) -> None:
    tuned = tensors["model.layers.0.mlp.down_proj.weight"] * np.float32(1.001)
    variants = [
        load(write_gguf()),
        load(write_gguf(), "bf16"),
        load(write_gguf("F16")),
        load(write_gguf(metadata={"llama.rope.freq_base": 50000.0})),
        load(write_gguf(tensors={"blk.0.ffn_down.weight": tuned})),
    ]
    assert len({v.fingerprint for v in variants}) == len(variants)


@pytest.mark.parametrize(
    ("stored", "has_bf16", "expected"),
    [
        ("F32", True, torch.float32),
        ("F16", True, torch.float32),
        ("Q8_0", True, torch.float32),
        ("BF16", True, torch.bfloat16),
        ("BF16", False, torch.float32),
    ],
)
def test_auto_dtype_on_the_cpu(
    stored: str, has_bf16: bool, expected: torch.dtype, write_gguf: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    checkpoint = open_checkpoint(resolve(ModelSource(model=str(write_gguf(stored)))))
    assert compute_dtype("auto", checkpoint, torch.device("cpu")) == torch.float32
    monkeypatch.setattr(dispatch, "native", lambda: dispatch.NativeModule(None, "gone"))
    assert compute_dtype("auto", checkpoint, torch.device("cpu")) == expected
    assert kv_dtype("auto", "auto", checkpoint, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("stored", "kv", "dtype", "is_exact", "expected"),
    [
        ("F32", "auto", "auto", False, torch.float32),
        ("F16", "auto", "auto", False, torch.float16),
        ("BF16", "auto", "auto", False, torch.bfloat16),
        ("Q8_0", "auto", "auto", False, torch.float16),
        ("Q8_0", "auto", "bf16", False, torch.bfloat16),
        ("BF16", "auto", "bf16", True, torch.float32),
        ("F32", "q8", "auto", True, torch.uint8),
        ("F32", "bf16", "f16", False, torch.bfloat16),
    ],
)
def test_dtype_of_keys_and_values(
    stored: str, kv: KvDType, dtype: DType, is_exact: bool, expected: torch.dtype, write_gguf: Write
) -> None:
    checkpoint = open_checkpoint(resolve(ModelSource(model=str(write_gguf(stored)))))
    assert kv_dtype(kv, dtype, checkpoint, torch.device("cpu"), is_exact=is_exact) == expected


def test_auto_dtype_elsewhere(write_gguf: Write) -> None:
    for stored, expected in [("F16", torch.float16), ("F32", torch.bfloat16)]:
        checkpoint = open_checkpoint(resolve(ModelSource(model=str(write_gguf(stored)))))
        assert compute_dtype("auto", checkpoint, torch.device("cuda")) == expected
