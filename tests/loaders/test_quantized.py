"""Quantised files: those of llama-quantize bit for bit, and what goes into them comes out again."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from kernels.formats import BY_NAME
from serve_app.__main__ import main
from serve_app.engine.llm import LLM
from serve_app.errors import ModelFileError
from serve_app.gguf_file import open_gguf
from serve_app.loaders.checkpoint import StoredTensor
from serve_app.loaders.model_files import resolve
from serve_app.loaders.quantized import Source
from serve_app.loaders.quantized_importance import importance_of
from serve_app.options import ModelSource
from serve_app.quant import dequantize, quantize
from serve_app.quant.imatrix import read_imatrix, write_imatrix

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


@pytest.mark.parametrize("isq", ["HQQ4", "FP8"])
def test_a_gguf_becomes_a_folder_that_loads(isq: str, tmp_path: Path) -> None:
    assert quantise(tmp_path / "from-gguf", isq) == 0
    assert quantise(tmp_path / "from-hf", isq, source=STORIES / "hf") == 0
    text = (STORIES / "sampled_text.txt").read_text()[:3000]
    with LLM(str(tmp_path / "from-gguf")) as ours, LLM(str(tmp_path / "from-hf")) as expected, LLM(str(SOURCE)) as full:
        ids = full.tokenizer.encode(text)
        assert ours.tokenizer.encode(text) == ids
        assert ours.tokenizer.decode(ids) == full.tokenizer.decode(ids)
        assert ours.tokenizer.bos_id == full.tokenizer.bos_id
        assert resolve(ModelSource(model=str(tmp_path / "from-gguf"))).eos_ids == full.tokenizer.eos_ids
        # Rows of q and k are in the order of the checkpoint again, so that both folders hold the same blocks.
        assert torch.equal(ours.logits(ids[:100]), expected.logits(ids[:100]))


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


def test_a_calibration_text_gives_the_matrix_that_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text((STORIES / "sampled_text.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    saved = tmp_path / "i.gguf"
    given = ("--calibration-file", str(text), "--save-imatrix", str(saved))
    assert quantise(tmp_path / "computed.gguf", "Q3K", *given) == 0
    assert "importance matrix: 1024 tokens in" in capsys.readouterr().out
    assert quantise(tmp_path / "read.gguf", "Q3K", "--imatrix", str(saved)) == 0
    assert quantise(tmp_path / "plain.gguf", "Q3K") == 0
    computed, read, plain = (
        np.concatenate([t.data.reshape(-1).view(np.uint8) for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors])
        for name in ("computed", "read", "plain")
    )
    # Sums over counts differ from the means they were made of in the last place.
    assert (computed != read).mean() < 1e-3
    assert (computed != plain).mean() > 0.1
    assert set(read_imatrix(saved)) >= {"token_embd.weight", "blk.3.ffn_down.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--imatrix", "a.dat", "--calibration-file", "b.txt"], "choose one"),
        (["--save-imatrix", "a.dat"], "--save-imatrix keeps what --calibration-file computes"),
        (["--calibration-file", "b.txt", "--save-imatrix", "a.bin"], "saved as .gguf or .dat, not as 'a.bin'"),
        (["--calibration-file", "missing.txt"], "--calibration-file: missing.txt cannot be read"),
    ],
)
def test_mistakes_about_importance(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantise(tmp_path / "a.gguf", "Q4K", *options) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_experts_in_tensors_of_their_own_take_their_part_of_an_entry() -> None:
    entry = np.arange(3 * 8, dtype=np.float32)
    importance = {"blk.1.ffn_up_exps.weight": entry}
    stored = StoredTensor("a", "b", BY_NAME["F32"], (4, 8), np.zeros(128, np.uint8))
    found = importance_of(Source.of(stored, "blk.1.ffn_up.2.weight"), importance)
    assert found is not None
    assert found.tolist() == entry[16:].tolist()
    assert importance_of(Source.of(stored, "blk.0.ffn_up.2.weight"), importance) is None
    with pytest.raises(ModelFileError, match=r"has 0 values for 'blk\.1\.ffn_up\.3\.weight'"):
        importance_of(Source.of(stored, "blk.1.ffn_up.3.weight"), importance)


def test_a_broken_off_file_never_bears_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("serve_app.loaders.recode.requantize", fails)
    assert quantise(tmp_path / "a.gguf", "Q4K") == 130
    assert os.listdir(tmp_path) == []
