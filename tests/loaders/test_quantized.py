"""Quantised files: those of llama-quantize bit for bit, and what goes into them comes out again."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from serve_app.__main__ import main
from serve_app.engine.llm import LLM
from serve_app.gguf_file import open_gguf
from serve_app.quant import dequantize, quantize
from serve_app.quant.imatrix import write_imatrix

STORIES = Path(__file__).parents[1] / "data" / "models" / "stories3M"
SOURCE = STORIES / "stories3M-F32.gguf"
PROMPT = "Once upon a time"


def quantise(target: Path, isq: str, *options: str, source: Path = SOURCE) -> int:
    return main(["quantize", "-m", str(source), "--isq", isq, "-o", str(target), *options])


@pytest.mark.parametrize("name", ["Q4_0", "Q2_K", "Q4_K_M"])
def test_tensors_are_those_of_llama_quantize(name: str, tmp_path: Path) -> None:
    assert quantise(tmp_path / "a.gguf", name) == 0
    ours, theirs = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(STORIES / f"stories3M-{name}.gguf")
    expected = {t.name: t for t in theirs.tensors}
    assert {t.name: t.tensor_type for t in ours.tensors} == {n: t.tensor_type for n, t in expected.items()}
    for tensor in ours.tensors:
        np.testing.assert_array_equal(tensor.data, expected[tensor.name].data)
    assert set(ours.fields) == set(theirs.fields)
    assert ours.fields["general.file_type"].contents() == theirs.fields["general.file_type"].contents()


def test_several_types_give_several_files(tmp_path: Path) -> None:
    assert quantise(tmp_path / "a.gguf", "Q4K,8") == 0
    with open_gguf(tmp_path / "a-Q4_K.gguf") as file:
        types = {name: info.type_id for name, info in file.tensors.items()}
    assert types["blk.0.attn_q.weight"] == 12
    assert types["token_embd.weight"] == 14
    assert types["blk.0.attn_norm.weight"] == 0
    with LLM(str(tmp_path / "a-Q8_0.gguf")) as ours, LLM() as embedded:
        ids = ours.tokenizer.encode(PROMPT)
        assert torch.equal(ours.logits(ids), embedded.logits(ids))


def test_a_folder_gives_the_gguf_that_a_gguf_gives(tmp_path: Path) -> None:
    assert quantise(tmp_path / "a.gguf", "Q4_K_M", source=STORIES / "hf") == 0
    ours, theirs = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(STORIES / "stories3M-Q4_K_M.gguf")
    expected = {t.name: t for t in theirs.tensors}
    assert {t.name for t in ours.tensors} == set(expected)
    for tensor in ours.tensors:
        np.testing.assert_array_equal(tensor.data, expected[tensor.name].data)
    with LLM(str(tmp_path / "a.gguf")) as made, LLM(str(STORIES / "stories3M-Q4_K_M.gguf")) as given:
        text = (STORIES / "sampled_text.txt").read_text()[:5000]
        assert made.tokenizer.encode(text) == given.tokenizer.encode(text)


def test_rows_that_do_not_divide_fall_back_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = STORIES.parent / "stories260K" / "stories260K-F32.gguf"
    assert quantise(tmp_path / "a.gguf", "Q4K", source=source) == 0
    assert "Q4_K → Q5_0: blk.0.attn_k.weight" in caplog.text
    assert "Q4_K → F16: blk.0.ffn_down.weight" in caplog.text
    with LLM(str(tmp_path / "a.gguf")) as llm:
        assert torch.isfinite(llm.logits(llm.tokenizer.encode(PROMPT))).all()


@pytest.mark.parametrize("isq", ["HQQ4", "HQQ8", "FP8", "Q8_1", "Q8_K", "Q4K"])
def test_folders_hold_every_type_and_load_again(isq: str, tmp_path: Path) -> None:
    assert quantise(tmp_path / "a", isq, source=STORIES / "hf") == 0
    with LLM(str(tmp_path / "a")) as ours, LLM(str(SOURCE)) as full:
        ids = ours.tokenizer.encode(PROMPT)
        expected = torch.softmax(full.logits(ids).float()[-1], -1)
        found = torch.softmax(ours.logits(ids).float()[-1], -1)
        assert float((found - expected).abs().sum()) < (0.25 if "4" in isq else 0.05)


@pytest.mark.parametrize("isq", ["HQQ4", "FP8", "Q8_1", "Q8_K"])
def test_types_that_no_gguf_holds_are_refused(isq: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantise(tmp_path / "a.gguf", isq) == 2
    assert f"{isq} cannot be written as .gguf: ggml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("isq", "target", "message"),
    [
        ("Q9K", "a.gguf", "unknown quantisation type 'Q9K'"),
        ("IQ4_XS", "a.gguf", "IQ4_XS can be read but not written"),
        ("", "a.gguf", "needs a type"),
        ("Q4K,4", "a.gguf", "names a type twice"),
        ("Q4K", "missing/a.gguf", "there is no folder"),
    ],
)
def test_mistakes_are_one_sentence(
    isq: str, target: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantise(tmp_path / target, isq) == 2
    assert message in capsys.readouterr().err


def test_an_importance_matrix_counts(tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    importance = np.random.default_rng(0).random(256).astype(np.float32)
    write_imatrix(tmp_path / "i.dat", {name: importance})
    assert quantise(tmp_path / "a.gguf", "Q4K", "--imatrix", str(tmp_path / "i.dat")) == 0
    with open_gguf(SOURCE) as source, open_gguf(tmp_path / "a.gguf") as made:
        values = source.data(name).view(np.float32).reshape(source.tensors[name].shape)
        expected = quantize(values, "Q4_K", importance)
        found = made.data(name).reshape(len(values), -1)
        np.testing.assert_array_equal(found, expected)
        assert np.abs(dequantize(np.ascontiguousarray(found), "Q4_K") - values).max() < 0.2


def test_a_broken_off_file_never_bears_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("serve_app.loaders.recode.requantize", fails)
    assert quantise(tmp_path / "a.gguf", "Q4K") == 130
    assert os.listdir(tmp_path) == []
