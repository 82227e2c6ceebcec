"""GGML's containers from before GGUF: the same model as from SafeTensors, and clear words for what is too old."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from ggml_writer import OWN_NAMES, from_gguf, random_llama
from tiny_llama import full_logits

from serve_app.__main__ import main
from serve_app.errors import ModelFileError
from serve_app.ggml_file import open_ggml
from serve_app.gguf_file import open_gguf
from serve_app.loaders.check import check_model
from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.options import ModelSource
from serve_app.text.tokenizer import open_tokenizer

STORIES = Path(__file__).parents[1] / "data" / "models" / "stories260K"
STORIES_3M = STORIES.with_name("stories3M")
IDS = [1, 403, 407, 261, 378, 31, 285, 68, 401, 396]


def found(path: Path, **options: Any) -> ModelFiles:
    return resolve(ModelSource(model=str(path), **options))


def logits(files: ModelFiles) -> torch.Tensor:
    loaded = load_model(files, dtype="f32", device="cpu", is_exact=True)
    return full_logits(loaded.model, IDS)


@pytest.mark.parametrize(("magic", "version"), [("ggml", 0), ("ggmf", 1), ("ggjt", 1), ("ggjt", 2), ("ggjt", 3)])
@pytest.mark.parametrize("stored", ["F32", "F16"])
def test_floats_of_every_container_are_those_of_the_folder(
    magic: str, version: int, stored: str, tmp_path: Path
) -> None:
    path = from_gguf(STORIES / f"stories260K-{stored}.gguf", tmp_path / "model.ggml.bin", magic, version)
    files = found(path, tokenizer=str(STORIES / "hf"))
    assert (files.kind, files.model_name, files.architecture) == ("ggml", "model.ggml", "llama")
    expected = logits(found(STORIES / "hf"))
    tolerance = 1e-5 if stored == "F32" else 5e-3
    assert (logits(files) - expected).abs().max() <= tolerance * expected.abs().max()
    check_model(files)


@pytest.mark.parametrize("stored", ["Q4_0", "Q6_K", "Q4_K_M", "Q2_K"])
def test_blocks_of_today_are_those_of_the_gguf(stored: str, tmp_path: Path) -> None:
    source = STORIES_3M / f"stories3M-{stored}.gguf"
    path = from_gguf(source, tmp_path / "model.bin")
    assert torch.equal(logits(found(path)), logits(found(source)))


@pytest.mark.parametrize(
    ("version", "stored", "first"),
    [(1, "Q5_0", 2), (1, "Q4_0", 3), (2, "Q4_0", 3), (2, "Q4_1", 3), (2, "Q8_0", 3), (2, "Q4_K", 3), (1, "Q5_1", 2)],
)
def test_layouts_that_were_given_up_are_refused(version: int, stored: str, first: int, tmp_path: Path) -> None:
    path = random_llama(tmp_path / "old.bin", "ggjt", version, stored)
    sentence = rf"old\.bin: tensor .* has {stored} blocks in a layout from before ggjt version {first} \(May 2023\)"
    with pytest.raises(ModelFileError, match=sentence):
        open_ggml(path)
    for magic in ("ggml", "ggmf"):
        with pytest.raises(ModelFileError, match=f"{stored} blocks in a layout from before"):
            open_ggml(random_llama(path, magic, 1, stored))
    open_ggml(random_llama(path, "ggjt", first, stored)).close()


def test_the_vocabulary_is_that_of_the_gguf(tmp_path: Path) -> None:
    source = STORIES / "stories260K-F32.gguf"
    path = from_gguf(source, tmp_path / "model.bin")
    with open_ggml(path) as old, open_gguf(source) as new:
        for key in ("tokens", "token_type", "scores"):
            assert list(old.metadata[f"tokenizer.ggml.{key}"]) == list(new.metadata[f"tokenizer.ggml.{key}"])
    ours, theirs = (open_tokenizer(found(p).tokenizer_source) for p in (path, source))
    assert ours.encode("Zoë and\ta  cat") == theirs.encode("Zoë and\ta  cat")
    assert (ours.bos_id, ours.eos_ids[0], ours.add_bos) == (1, 2, True)


def test_the_oldest_files_need_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    path = from_gguf(STORIES / "stories260K-F32.gguf", tmp_path / "model.bin", "ggml")
    with pytest.raises(ModelFileError, match=r"has neither tokenizer\.json nor .*; name one with --tokenizer"):
        open_tokenizer(found(path).tokenizer_source)
    named = found(path, tokenizer=str(STORIES / "hf" / "tokenizer.model"))
    assert open_tokenizer(named.tokenizer_source).vocab_size == 512


def test_key_heads_are_told_by_the_tensors_and_checked_against_the_option(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "grouped.bin", n_kv_heads=2)
    for options in ({}, {"gqa": 2}):
        files = found(path, **options)
        check_model(files)
        assert files.gguf_metadata is not None
        assert files.gguf_metadata["llama.attention.head_count_kv"] == 2
    with pytest.raises(ModelFileError, match="--gqa 4 does not fit its 4 query heads and 2 key heads, which are 2 to"):
        found(path, gqa=4)


@pytest.mark.parametrize("folder_option", [{}, {"kind": "ggml"}, {"files": ("*.bin",)}, {"files": ("a.bin",)}])
def test_found_in_a_folder_by_its_first_bytes(folder_option: dict[str, Any], tmp_path: Path) -> None:
    path = random_llama(tmp_path / "a.bin")
    assert found(tmp_path, **folder_option).weight_files == (path,)
    if "files" not in folder_option:
        (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
        assert found(tmp_path, **folder_option).weight_files == (path,)
        random_llama(tmp_path / "b.bin")
        with pytest.raises(ModelFileError, match=r"holds several GGML models, choose one with -f: a\.bin, b\.bin"):
            found(tmp_path, **folder_option)


def test_first_bytes_say_more_than_names(tmp_path: Path) -> None:
    old = random_llama(tmp_path / "old.gguf")
    assert found(old).kind == "ggml"
    assert found(tmp_path, files=("old.gguf",)).kind == "ggml"
    with pytest.raises(ModelFileError, match=r"old\.gguf: is a file of the kind ggml"):
        found(tmp_path, kind="gguf")
    new = tmp_path / "new.bin"
    new.write_bytes((STORIES / "stories260K-F32.gguf").read_bytes())
    assert found(new).kind == "gguf"
    with pytest.raises(ModelFileError, match=r"new\.bin: is a file of the kind gguf"):
        found(tmp_path, kind="ggml", files=("new.bin",))


def test_it_becomes_a_gguf(tmp_path: Path) -> None:
    source = STORIES_3M / "stories3M-F32.gguf"
    old, new = from_gguf(source, tmp_path / "old.bin"), tmp_path / "new.gguf"
    assert main(["quantize", "ggml", "-m", str(old), "--isq", "F16", "-o", str(new)]) == 0
    files = found(new)
    assert (files.kind, files.model_name) == ("gguf", "new")
    assert (logits(files) - logits(found(source))).abs().max() <= 5e-3 * logits(found(source)).abs().max()
    text = "Zoë and\ta  cat"
    ours, theirs = (open_tokenizer(found(p).tokenizer_source) for p in (new, source))
    assert ours.encode(text) == theirs.encode(text)
    gguf.GGUFReader(new)


def test_a_second_part_is_named(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "m.bin")
    path.with_name("m.bin.1").touch()
    with pytest.raises(ModelFileError, match=r"m\.bin: goes on in m\.bin\.1; models in several such parts are not"):
        open_ggml(path)


@pytest.mark.parametrize("name", ["output", "attn_k", "ffn_gate", "ffn_norm", "token_embd", "attn_q"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    path = random_llama(tmp_path / "m.bin")
    own = OWN_NAMES[name].encode() + b".weight"
    content = path.read_bytes()
    assert own in content
    path.write_bytes(content.replace(own, own.replace(b"w", b"x")))
    with pytest.raises(ModelFileError, match=f"m.bin: tensor '.*{name if name == 'attn_q' else OWN_NAMES[name]}.*'"):
        check_model(found(path))


def test_a_damaged_file_is_read_or_refused_by_name(tmp_path: Path) -> None:
    content = random_llama(tmp_path / "m.bin", type_name="F16").read_bytes()
    path = tmp_path / "bad.bin"
    refusals = []
    header = 8 + 28 + 8 * 10 + 64
    variants = [content[:size] for size in [*range(4, header, 3), len(content) - 1, len(content) // 2]]
    for at in range(4, header):
        for byte in (0x00, 0x7F, 0xFF):
            variants.append(content[:at] + bytes([byte]) + content[at + 1 :])
    for variant in variants:
        path.write_bytes(variant)
        try:
            open_ggml(path).close()
        except ModelFileError as error:
            refusals.append(str(error))
    assert all(sentence.startswith(f"{path}: ") for sentence in refusals)
    assert len(refusals) > len(variants) // 3
