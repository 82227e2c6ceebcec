"""Weights quantised while they are loaded are those of the files that `sirocco quantize` writes."""

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import dispatch
from serve_app.__main__ import main
from serve_app.engine.llm import LLM
from serve_app.errors import ModelFileError
from serve_app.loaders import isq_progress
from serve_app.loaders.check import check_model
from serve_app.loaders.isq_progress import LogProgress
from serve_app.loaders.load import LoadedModel, load_model
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.options import IsqOptions, ModelSource
from serve_app.quant.imatrix import Importance, write_imatrix
from tests.loaded_weights import matrices, same
from tests.mixtures import hf_mixture, saved, write_gguf

DATA = Path(__file__).parents[1] / "data"
STORIES = DATA / "models" / "stories3M"
FOLDER, GGUF = STORIES / "hf", STORIES / "stories3M-F32.gguf"
PROMPT = "Once upon a time"


def files(path: Path, **isq: Any) -> ModelFiles:
    return resolve(ModelSource(model=str(path), isq=IsqOptions(**isq) if isq else None))


def load(path: Path, **isq: Any) -> LoadedModel:
    return load_model(files(path, **isq), dtype="auto", device="cpu")


def quantised(source: Path, target: Path, isq: str, *options: str) -> Path:
    assert main(["quantize", "-m", str(source), "--isq", isq, "-o", str(target), *options]) == 0
    return target


@pytest.mark.parametrize("isq", ["Q4_K_M", "hqq4", "FP8", "Q8_1", "MXFP4", "2", "F16"])
def test_a_folder_becomes_the_quantised_folder(isq: str, tmp_path: Path) -> None:
    source = ModelSource(model=str(FOLDER), isq=IsqOptions(type=isq))
    with LLM(source) as ours, LLM(str(quantised(FOLDER, tmp_path / "a", isq))) as written:
        ids = ours.tokenizer.encode(PROMPT)
        assert torch.equal(ours.logits(ids), written.logits(ids))
        assert same(ours.engine.parts.runner.model, written.engine.parts.runner.model)


@pytest.mark.parametrize("name", ["stories3M-F32", "stories3M-Q6_K", "stories3M-Q4_0"])
def test_a_gguf_of_any_type_becomes_the_quantised_gguf(name: str, tmp_path: Path) -> None:
    source = STORIES / f"{name}.gguf"
    written = quantised(source, tmp_path / "a.gguf", "Q5_K_S")
    assert same(load(source, type="Q5_K_S").model, load(written).model)


def test_llama_quantize_writes_the_same() -> None:
    ours, theirs = load(GGUF, type="Q4_K_M"), load(STORIES / "stories3M-Q4_K_M.gguf")
    assert same(ours.model, theirs.model)
    assert ours.kv_dtype == theirs.kv_dtype


@pytest.mark.parametrize("isq", ["Q4K", "BF16"])
def test_in_plain_torch_too(isq: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "native", lambda: dispatch.NativeModule(None, "for this test"))
    source = STORIES.parent / "stories260K" / "hf"  # rows that fall back, and a plain type among them
    ours, written = load(source, type=isq), load(quantised(source, tmp_path / "a", isq))
    assert same(ours.model, written.model)
    assert {kind for kind, _ in matrices(ours.model).values()} != {"F32"}


@pytest.mark.parametrize("family", ["mixtral", "qwen2moe"])
def test_mixtures_and_their_experts(family: str, tmp_path: Path) -> None:
    model = hf_mixture(family, hidden_size=64, intermediate_size=128, moe_intermediate_size=64)
    tensors = saved(model, tmp_path / "hf")
    ours = load(tmp_path / "hf", type="Q4K")
    assert same(ours.model, load(quantised(tmp_path / "hf", tmp_path / "a", "Q4K")).model)
    types = {path: kind for path, (kind, _) in matrices(ours.model).items()}
    assert {"Q5_0", "Q8_0"} <= set(types.values())
    assert all(kind == "dense" or kind == "F32" for path, kind in types.items() if "router" in path)
    for is_old in (False, True):
        path = write_gguf(tmp_path / f"{is_old}.gguf", family, model.config, tensors, is_old=is_old)
        assert same(load(path, type="Q4K").model, load(quantised(path, tmp_path / f"{is_old}-q.gguf", "Q4K")).model)


def test_experts_alone() -> None:
    loaded = load(DATA / "mixtures" / "qwen3moe.gguf", type="Q8_0", experts_only=True)
    types = {path: kind for path, (kind, _) in matrices(loaded.model).items()}
    experts = {path for path in types if any(f".{name}." in path for name in ("gate", "up", "down"))}
    assert {types[path] for path in experts} == {"Q8_0"}
    assert {kind for path, kind in types.items() if path not in experts} == {"F32", "dense"}
    with pytest.raises(ModelFileError, match="only experts are to be quantised"):
        load(FOLDER, type="Q4K", experts_only=True)


def test_topology_in_load_and_command(tmp_path: Path) -> None:
    path = tmp_path / "t.yml"
    path.write_text("0-2: {isq: Q3K}\n'/down_proj/': {isq: HQQ4}\n")
    ours = load(FOLDER, type="Q6K", topology=str(path))
    written = quantised(FOLDER, tmp_path / "a", "Q6K", "--topology", str(path))
    assert same(ours.model, load(written).model)
    assert {kind for kind, _ in matrices(ours.model).values()} == {"Q3_K", "HQQ4", "Q6_K", "Q8_0"}
    alone = load(FOLDER, topology=str(path))
    assert {kind for kind, _ in matrices(alone.model).values()} >= {"Q3_K", "HQQ4", "F32"}
    assert main(["quantize", "-m", str(FOLDER), "--topology", str(path), "-o", str(tmp_path / "b")]) == 0
    assert same(alone.model, load(tmp_path / "b").model)
    path.write_text("0-99: {isq: Q3K}")
    with pytest.raises(ModelFileError, match="names layers"):
        load(FOLDER, topology=str(path))


def test_pure_and_importance(tmp_path: Path) -> None:
    names = [f"blk.{layer}.attn_q.weight" for layer in range(4)]
    rng = np.random.default_rng(0)
    write_imatrix(tmp_path / "i.dat", {name: rng.random(256).astype(np.float32) for name in names})
    written = quantised(
        FOLDER, tmp_path / "a", "Q4K", "--imatrix", str(tmp_path / "i.dat"), "--isq-organization", "pure"
    )
    ours = load(FOLDER, type="Q4K", is_pure=True, imatrix=str(tmp_path / "i.dat"))
    assert same(ours.model, load(written).model)
    assert not same(ours.model, load(FOLDER, type="Q4K", is_pure=True).model)


def test_a_text_is_handed_to_the_calibration(tmp_path: Path) -> None:
    text, seen = tmp_path / "t.txt", []
    text.write_text("Once upon a time")
    rng = np.random.default_rng(0)
    importance = {f"blk.{layer}.ffn_up.weight": rng.random(256).astype(np.float32) for layer in range(4)}

    def calibrate(files: ModelFiles, text: str) -> Importance:
        seen.append((files.isq, text))
        return importance

    write_imatrix(tmp_path / "i.dat", importance)
    ours = load_model(
        files(FOLDER, type="Q4K", calibration_file=str(text)), dtype="auto", device="cpu", calibrate=calibrate
    )
    assert seen == [(None, "Once upon a time")]
    assert same(ours.model, load(FOLDER, type="Q4K", imatrix=str(tmp_path / "i.dat")).model)


def test_the_prefix_cache_is_another_for_every_type(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.dat", {"blk.0.attn_q.weight": np.ones(256, np.float32)})
    found = [
        load(FOLDER, **isq).fingerprint
        for isq in (
            {},
            {"type": "Q4K"},
            {"type": "Q4K", "is_pure": True},
            {"type": "Q8_0"},
            {"type": "Q4K", "imatrix": str(tmp_path / "i.dat")},
        )
    ]
    assert len(set(found)) == len(found)
    assert load(FOLDER, type="q4k").fingerprint == found[1]


def test_the_log_says_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve_app")
    source = STORIES.parent / "stories260K" / "stories260K-F32.gguf"
    loaded = load(source, type="Q4K")
    assert "rows are no whole blocks, Q4_K → F16: blk.0.ffn_down.weight" in caplog.text
    report = loaded.isq
    assert report is not None
    assert f"Q4_K, {report.num_tensors} tensors quantised, {report.bits_per_weight:.2f} bits a weight" in caplog.text
    weights = report.bytes_after * 8 / report.bits_per_weight
    assert report.bytes_before == pytest.approx(4 * weights)
    assert load(source).isq is None
    load(STORIES / "stories3M-Q4_0.gguf", type="Q8_0")
    assert "is quantised already" in caplog.text


def test_progress_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve_app")
    ticks = itertools.count(0, 10)
    listener = LogProgress(lambda: float(next(ticks)))
    load_model(files(FOLDER, type="Q4K"), dtype="auto", device="cpu", progress=listener)
    lines = [record.message for record in caplog.records if record.name == isq_progress.__name__]
    assert len(lines) == 38  # the model's tensors, in one piece each, each of them ten seconds long
    assert lines[1].startswith("Q4_K: 4 % (model.embed_tokens.weight), ")
    assert lines[-1].startswith("Q4_K: 100 % (model.layers.3.")
    assert lines[-1].endswith(", 0 s left")
    caplog.clear()
    now = 100.0
    progress = LogProgress(lambda: now)
    progress.start("x", 50_000_000)
    for now, num_bytes in ((105.0, 10_000_000), (110.0, 10_000_000), (119.0, 1), (120.0, 19_999_999)):
        progress.advance(f"at {now:.0f}", num_bytes)
    progress.finish()
    assert [record.message for record in caplog.records] == [
        "x: 40 % (at 110), 2 MB/s, 15 s left",
        "x: 80 % (at 120), 2 MB/s, 5 s left",
    ]


@pytest.mark.parametrize(
    ("isq", "message"),
    [
        ({"type": "Q9K"}, "in-situ quantization: unknown quantisation type 'Q9K'"),
        ({"type": "Q4_K_M", "is_pure": True}, "cannot be pure"),
        ({"type": "Q4K", "imatrix": "missing.dat"}, "missing.dat: cannot be read"),
        ({"type": "Q4K", "calibration_file": "missing.txt"}, "missing.txt: .*cannot be read"),
        ({"type": "Q4K", "topology": "missing.yml"}, "missing.yml: cannot be read"),
        ({"type": "Q4K", "imatrix": "a", "calibration_file": "b"}, "one of them can be used"),
    ],
)
def test_mistakes_show_before_a_tensor_is_read(isq: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        load(FOLDER, **isq)
    with pytest.raises(ModelFileError, match=message):
        check_model(files(FOLDER, **isq))
    check_model(files(FOLDER, type="Q4K"))


def test_values_that_cannot_be_kept_name_their_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight'.*finite"):
        load(tmp_path, type="Q4K")
