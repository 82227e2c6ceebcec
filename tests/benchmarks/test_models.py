"""Random models: both formats hold the same weights, and the engine loads them."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import models
from benchmarks.cpu_speed.cells import Cell
from benchmarks.cpu_speed.model_facts import ModelFacts
from benchmarks.random_models.draft_pair import DraftPair
from benchmarks.random_models.folder_writer import write_folder
from benchmarks.random_models.shapes import SHAPES
from benchmarks.random_models.values import rounded, stored
from benchmarks.random_models.vocabulary import make_vocabulary, vocabulary_from_gguf
from serve_app.engine.llm import LLM
from serve_app.options import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tiny model in both formats."""
    path = tmp_path_factory.mktemp("models")
    models.main(["tiny", str(path)])
    return path


def test_both_formats_give_the_same_logits(folder: Path) -> None:
    with LLM(str(folder / "tiny-BF16.gguf"), dtype="f32") as packed, LLM(str(folder / "tiny"), dtype="f32") as dense:
        ids = packed.tokenizer.encode(" a b c hello, world")
        assert ids == dense.tokenizer.encode(" a b c hello, world")
        ours, theirs = packed.logits(ids), dense.logits(ids)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert 0.05 < float(ours.std()) < 5
        sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        assert len(packed.generate(" a b c", sampling)[0].token_ids) == 8


def test_words_of_one_letter_are_tokens(folder: Path) -> None:
    with LLM(str(folder / "tiny-BF16.gguf")) as llm:
        assert len(llm.tokenizer.encode(" x q z a")) == 4 + 1
        assert llm.tokenizer.decode(llm.tokenizer.encode(" x q z a")[1:]) == " x q z a"


def test_what_is_there_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "tiny-BF16.gguf").stat().st_mtime_ns
    models.main(["tiny", str(folder), "--formats", "gguf"])
    assert (folder / "tiny-BF16.gguf").stat().st_mtime_ns == before
    assert "is there" in capsys.readouterr().out


def test_the_quantiser_is_told_source_target_and_type(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[2], 'w').write(' '.join(sys.argv[1:4]))\n")
    program.chmod(0o755)
    models.main(["tiny", str(folder), "--formats", "", "--quantize", str(program), "--types", "Q4_0"])
    source, target, quant_type = (folder / "tiny-Q4_0.gguf").read_text().split()
    assert (source, quant_type) == (str(folder / "tiny-BF16.gguf"), "Q4_0")
    assert target.endswith("tiny-Q4_0.gguf.unfinished")


def test_a_vocabulary_is_taken_over_and_filled_up(folder: Path) -> None:
    taken = vocabulary_from_gguf(folder / "tiny-BF16.gguf", 1030)
    made = make_vocabulary(1024)
    assert taken.tokens[:1024] == made.tokens
    assert taken.merges == made.merges
    assert len(taken.tokens) == len(taken.types) == 1030
    assert (taken.bos_id, taken.eos_id, taken.pre) == (made.bos_id, made.eos_id, made.pre)
    with pytest.raises(SystemExit, match="1024 tokens, the model only 1000"):
        vocabulary_from_gguf(folder / "tiny-BF16.gguf", 1000)


def test_a_vocabulary_of_full_size_has_no_token_twice() -> None:
    made = make_vocabulary(151936)
    assert len(made.tokens) == len(set(made.tokens)) == 151936
    known = set(made.tokens)
    assert all(part in known for merge in made.merges for part in merge.split(" "))


def test_the_shapes_are_those_of_the_known_models() -> None:
    assert SHAPES["llama-1b"].num_parameters == 1_235_814_400
    # Qwen2.5-0.5B has 494 032 768, of which 24 * (896 + 128 + 128) are biases.
    assert SHAPES["qwen-0.5b"].num_parameters == 494_032_768 - 24 * 1152
    for shape in SHAPES.values():
        assert shape.n_heads % shape.n_kv_heads == 0


def test_facts_of_a_file(folder: Path) -> None:
    shape = SHAPES["tiny"]
    facts = ModelFacts.of(folder / "tiny-BF16.gguf")
    assert facts.layer_products == shape.layer_products
    assert facts.head_products == shape.head_products
    assert facts.vocab_size == shape.vocab_size
    norms = (2 * shape.n_layers + 1) * shape.hidden_size
    rope_divisors = shape.head_dim // 2
    matrices = shape.num_parameters - norms
    assert facts.weight_bytes == 2 * matrices + 4 * (norms + rope_divisors)
    assert facts.kv_values == 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim
    assert facts.decode_bytes(100, "f16", 10) == facts.weight_bytes + 105 * facts.kv_values * 2
    assert facts.products_per_token(Cell("prefill", 10)) == facts.layer_products + facts.head_products / 10
    assert facts.products_per_token(Cell("batch", 32, 64, 8)) == facts.layer_products + facts.head_products


def test_bfloat16_is_rounded_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # two ties, one to each side
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(stored(values, "bf16").view(np.int16)), expected.view(torch.int16))
    assert torch.equal(torch.from_numpy(rounded(values, "bf16")), expected.float())
    assert np.array_equal(rounded(values, "f16"), values.astype(np.float16).astype(np.float32))


def test_a_draft_is_the_begin_of_its_target(tmp_path: Path) -> None:
    shape = replace(SHAPES["tiny"], n_layers=3, is_tied=False)
    pair = DraftPair(shape, 1, 0.25)
    pair.write_target(tmp_path / "target")
    pair.write_draft(tmp_path / "draft")
    pair.write_stranger(tmp_path / "stranger")
    write_folder(tmp_path / "plain", shape, make_vocabulary(shape.vocab_size), "bf16", 0)
    target, draft, stranger, plain = (
        load_file(tmp_path / name / "model.safetensors") for name in ("target", "draft", "stranger", "plain")
    )
    assert draft.keys() == stranger.keys() < target.keys()
    assert all(torch.equal(tensor, target[name]) for name, tensor in draft.items())
    assert not torch.equal(stranger["lm_head.weight"], draft["lm_head.weight"])
    changed = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(target[changed], plain[changed] / 4)
