"""Tokenizers of folders in a GGUF's words, and those of GGUF files as a folder's: both encode alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from serve_app.errors import LaunchError
from serve_app.gguf_file import open_gguf
from serve_app.text.gguf_tokenizer import tokenizer_values
from serve_app.text.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_name
from serve_app.text.tokenizer import open_tokenizer
from serve_app.text.tokenizer_export import write_tokenizer

DATA = Path(__file__).parents[1] / "data"
VOCAB = DATA / "vocab"


def texts_of(name: str) -> list[str]:
    return (VOCAB / f"{name}.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")


def values_of(folder: Path, architecture: str = "llama", vocab_size: int | None = None) -> dict[str, Any]:
    count = open_tokenizer(folder).vocab_size if vocab_size is None else vocab_size
    return {"general.architecture": architecture} | tokenizer_values(folder, {}, count, None)


def cut_to(count: int, metadata: dict[str, Any]) -> dict[str, Any]:
    """A byte-level vocabulary's first tokens, its control tokens, and the merges that lead to them: quick to build."""
    texts, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist()
    kept = [i for i in range(len(texts)) if i < count or types[i] != 1]
    known = {texts[i] for i in kept}
    merges = [m for m in metadata["tokenizer.ggml.merges"] if {*m.split(" "), m.replace(" ", "")} <= known]
    ids = {k: kept.index(v) for k, v in metadata.items() if k.endswith("token_id")}
    return (
        metadata
        | ids
        | {
            "tokenizer.ggml.tokens": [texts[i] for i in kept],
            "tokenizer.ggml.token_type": [types[i] for i in kept],
            "tokenizer.ggml.merges": merges,
        }
    )


@pytest.mark.parametrize("count", [3000, pytest.param(1 << 20, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    ("file", "texts", "pre"),
    [
        ("vocab/built-vocab-llama-bpe", "ggml-vocab-llama-bpe", "llama-bpe"),
        ("vocab/ggml-vocab-gpt-2", "ggml-vocab-gpt-2", "gpt-2"),
        ("models/stories260K/stories260K-F16", "ggml-vocab-llama-spm", "default"),
        pytest.param("vocab/ggml-vocab-llama-spm", "ggml-vocab-llama-spm", "default", marks=pytest.mark.nightly),
    ],
)
def test_to_a_folder_and_back(file: str, texts: str, pre: str, count: int, tmp_path: Path) -> None:
    with open_gguf(DATA / f"{file}.gguf") as opened:
        metadata = opened.metadata
    if pre != "default":
        metadata = cut_to(count, metadata)
    write_tokenizer(tmp_path, metadata)
    again = values_of(tmp_path)
    assert again["tokenizer.ggml.pre"] == pre
    first, folder, last = (open_tokenizer(source) for source in (metadata, tmp_path, again))
    for text in texts_of(texts):
        ids = first.encode(text)
        assert folder.encode(text) == ids
        assert last.encode(text) == ids
        assert folder.decode(ids) == last.decode(ids) == first.decode(ids)
    assert (folder.bos_id, folder.eos_ids[:1]) == (first.bos_id, first.eos_ids[:1])
    assert last.bos_id == first.bos_id
    assert last.special_ids == first.special_ids


@pytest.mark.nightly
def test_the_vocabulary_of_a_sentencepiece_model_is_the_published_one(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DATA / "tokenizers/llama2" / name, tmp_path / name)
    values = values_of(tmp_path)
    with open_gguf(VOCAB / "ggml-vocab-llama-spm.gguf") as opened:
        published = opened.metadata
    assert values["tokenizer.ggml.tokens"] == published["tokenizer.ggml.tokens"]
    assert values["tokenizer.ggml.scores"][3:] == published["tokenizer.ggml.scores"].tolist()[3:]
    assert values["tokenizer.ggml.token_type"][3:] == published["tokenizer.ggml.token_type"].tolist()[3:]


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    shutil.copy(DATA / "models/stories260K/hf/tokenizer.model", tmp_path / "tokenizer.model")
    ours, theirs = open_tokenizer(values_of(tmp_path)), open_tokenizer(tmp_path)
    for text in texts_of("ggml-vocab-llama-spm"):
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.nightly
def test_phi_3s_tokenizer_with_added_tokens() -> None:
    folder = DATA / "tokenizers/phi-3-mini"
    values = values_of(folder, "phi3")
    ours, theirs = open_tokenizer(values), open_tokenizer(folder)
    for text in ["<|user|>\nHi <|end|>\n<|assistant|>\n", "x <|end|>  y", *texts_of("ggml-vocab-llama-spm")[:20]]:
        assert ours.encode(text, parse_special=True) == theirs.encode(text, parse_special=True)


PUBLISHED_QWEN = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ],
}
PUBLISHED_STARCODER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
PUBLISHED_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}


def described(pre: dict[str, Any], normalizer: str | None, ignore_merges: bool = False) -> Tokenizer:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [], "ignore_merges": ignore_merges}
    kind = None if normalizer is None else {"type": normalizer}
    return Tokenizer.from_str(json.dumps({"model": model, "pre_tokenizer": pre, "normalizer": kind}))


@pytest.mark.parametrize(
    ("pre", "normalizer", "preferred", "expected"),
    [
        (PUBLISHED_QWEN, "NFC", None, "qwen2"),
        (PUBLISHED_QWEN, None, None, None),
        (PUBLISHED_STARCODER, None, "starcoder", "starcoder"),
        (PUBLISHED_STARCODER, None, "refact", "refact"),
        (PUBLISHED_GPT2, None, "phi-2", "phi-2"),
        (PUBLISHED_GPT2, None, "refact", "gpt-2"),
        (PREFIXED, None, None, None),
    ],
)
def test_names_of_published_ways_to_cut(
    pre: dict[str, Any], normalizer: str | None, preferred: str | None, expected: str | None
) -> None:
    assert pre_tokenizer_name(described(pre, normalizer), preferred) == expected


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_known_way_has_a_name_that_means_the_same(name: str) -> None:
    kind = PRE_TOKENIZERS[name]
    tokenizer = described(PREFIXED, None, kind.ignores_merges)
    tokenizer.pre_tokenizer = kind.build()
    if kind.normalizer is not None:
        tokenizer.normalizer = kind.normalizer()
    assert pre_tokenizer_name(tokenizer, name) == name
    found = pre_tokenizer_name(tokenizer)
    assert found is not None
    sample = "I'll pay 12345 €, x2!\r\n  été"
    assert PRE_TOKENIZERS[found].build().pre_tokenize_str(sample) == kind.build().pre_tokenize_str(sample)


def test_an_unknown_way_to_cut_is_refused(tmp_path: Path) -> None:
    described(PREFIXED, None).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(LaunchError, match="no name in a GGUF"):
        values_of(tmp_path)
    content = {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(LaunchError, match="kind Unigram"):
        values_of(tmp_path)


def test_as_many_tokens_as_rows(caplog: pytest.LogCaptureFixture) -> None:
    folder = DATA / "models/stories260K/hf"
    more = values_of(folder, vocab_size=520)
    assert more["tokenizer.ggml.tokens"][510:514] == [*more["tokenizer.ggml.tokens"][510:512], "[PAD512]", "[PAD513]"]
    assert more["tokenizer.ggml.token_type"][512:] == [5] * 8
    assert "left out" not in caplog.text
    less = values_of(folder, vocab_size=500)
    assert [len(less[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type", "scores")] == [500] * 3
    assert "from 500 on" in caplog.text
