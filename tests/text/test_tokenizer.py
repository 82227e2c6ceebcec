import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, processors
from transformers import PreTrainedTokenizerFast

from serve_app.errors import InvalidRequest, ModelFileError
from serve_app.gguf_file import open_gguf
from serve_app.text.detokenizer import Detokenizer, DetokenizerTable
from serve_app.text.gguf_vocab import vocabulary_from_gguf
from serve_app.text.pre_tokenizers import PRE_TOKENIZERS
from serve_app.text.tokenizer import Tokenizer, open_tokenizer

DATA = Path(__file__).parents[1] / "data"
VOCABS = {
    "gpt-2": "ggml-vocab-gpt-2.gguf",
    "llama-spm": "ggml-vocab-llama-spm.gguf",
    "llama-bpe": "built-vocab-llama-bpe.gguf",
    "phi-3": "ggml-vocab-phi-3.gguf",
}
SENTENCEPIECE = ("llama-spm", "phi-3")
LLAMA2 = DATA / "tokenizers/llama2/tokenizer.model"
PHI3 = DATA / "tokenizers/phi-3-mini"
STORIES = DATA / "models/stories260K"
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.fixture(scope="module")
def vocab() -> Callable[[str], Tokenizer]:
    opened: dict[str, Tokenizer] = {}

    def get(name: str) -> Tokenizer:
        if name not in opened:
            opened[name] = open_tokenizer(DATA / "vocab" / VOCABS[name])
        return opened[name]

    return get


def cases(name: str) -> list[tuple[str, list[int]]]:
    texts = (DATA / f"vocab/ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (DATA / f"vocab/ggml-vocab-{name}.gguf.out").read_text().split("\n")
    assert len(texts) == len(lines) > 40
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize("name", VOCABS)
def test_encodes_and_decodes_the_published_cases(name: str, vocab: Callable[[str], Tokenizer]) -> None:
    tokenizer = vocab(name)
    for text, ids in cases(name):
        assert tokenizer.encode(text, add_special=False) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", VOCABS)
def test_streams_the_published_cases_without_breaking_a_character(name: str, vocab: Callable[[str], Tokenizer]) -> None:
    tokenizer = vocab(name)
    table = DetokenizerTable(tokenizer)
    for text, ids in cases(name):
        for prompt in ([], [tokenizer.bos_id]):
            detokenizer = Detokenizer(table, (), prompt)
            sent = ""
            for i in ids:
                sent += detokenizer.push(i)
                assert text.startswith(sent)
            assert sent + detokenizer.flush() == text


@pytest.mark.parametrize("name", VOCABS)
@settings(max_examples=100)
@given(text=TEXTS)
@example(text="a▁ ▁")
def test_any_text_comes_back(name: str, vocab: Callable[[str], Tokenizer], text: str) -> None:
    tokenizer = vocab(name)
    # SentencePiece writes ▁ for a space, and so cannot tell them apart.
    expected = text.replace("▁", " ") if name in SENTENCEPIECE else text
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_facts_of_the_vocabularies(vocab: Callable[[str], Tokenizer]) -> None:
    llama3, llama2, gpt2 = vocab("llama-bpe"), vocab("llama-spm"), vocab("gpt-2")
    assert (llama3.vocab_size, llama3.bos_id, llama3.eos_ids[:2]) == (128256, 128000, (128001, 128009))
    assert (llama3.add_bos, llama3.add_eos, len(llama3.special_ids)) == (True, False, 256)
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_ids, llama2.add_bos) == (32000, 1, (2,), True)
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_ids, gpt2.add_bos) == (50257, 50256, (50256,), False)
    assert llama3.token_to_id("<|eot_id|>") == 128009
    assert llama3.token_to_id("no such token") is None
    assert llama3.token_text(128009) == "<|eot_id|>"
    assert llama3.token_bytes(128009) == b""
    assert llama2.token_bytes(3 + 0xE2) == b"\xe2"
    assert llama2.token_text(3 + 0xE2) == r"bytes:\xe2"
    assert llama2.token_text(15043) == " Hello"
    assert llama2.token_bytes(10**6) == b""


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "llama-bpe"])
def test_control_tokens_in_a_user_s_text_are_text(name: str, vocab: Callable[[str], Tokenizer]) -> None:
    tokenizer = vocab(name)
    for special in sorted(tokenizer.special_ids)[:12]:
        name_of_it = tokenizer.token_text(special)
        for text in (name_of_it, f"a{name_of_it}b", f"{name_of_it} {name_of_it}\n"):
            ids = tokenizer.encode(text, add_special=False)
            assert tokenizer.special_ids.isdisjoint(ids)
            assert tokenizer.decode(ids) == text
        assert tokenizer.encode(f"a{name_of_it}", add_special=False, parse_special=True)[-1] == special


def test_bos_is_never_doubled(vocab: Callable[[str], Tokenizer]) -> None:
    llama3 = vocab("llama-bpe")
    assert llama3.encode("Hi")[0] == llama3.bos_id
    written_out = llama3.encode("<|begin_of_text|>Hi", parse_special=True)
    assert written_out == llama3.encode("Hi")
    assert llama3.encode("") == [llama3.bos_id]
    assert llama3.encode("<|begin_of_text|>", add_special=False, parse_special=True) == [llama3.bos_id]


def test_decode_can_show_control_tokens(vocab: Callable[[str], Tokenizer]) -> None:
    llama3 = vocab("llama-bpe")
    ids = [*llama3.encode("Hi"), 128009]
    assert llama3.decode(ids) == "Hi"
    assert llama3.decode(ids, skip_special=False) == "<|begin_of_text|>Hi<|eot_id|>"
    assert llama3.decode([10**7, -1]) == ""


def test_a_lone_surrogate_is_the_client_s_mistake(vocab: Callable[[str], Tokenizer]) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        vocab("gpt-2").encode("a\ud800")


def test_every_source_of_a_model_gives_the_same_ids(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((STORIES / "hf/tokenizer.model").read_bytes())
    sources = [STORIES / "hf", STORIES / "hf/tokenizer.json", STORIES / "stories260K-F32.gguf", tmp_path]
    tokenizers = [open_tokenizer(s) for s in sources]
    with open_gguf(STORIES / "stories260K-F32.gguf") as file:
        tokenizers.append(open_tokenizer(file.metadata))
    golden = json.loads((STORIES / "golden_greedy.json").read_text())["cases"]
    assert any(case["text"] for case in golden)
    for tokenizer in tokenizers:
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.add_bos) == (512, 1, True)
        assert tokenizer.eos_ids[0] == 2
        for case in golden:
            assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
            if case["text"] is not None:
                assert tokenizer.decode(case["prompt_ids"] + case["generated_ids"]) == case["text"]
    texts = [text for text, _ in cases("llama-spm")]
    for text in texts:
        assert len({tuple(t.encode(text)) for t in tokenizers}) == 1


@pytest.mark.parametrize("path", [LLAMA2, STORIES / "hf/tokenizer.model"], ids=["llama2", "stories"])
@settings(max_examples=300)
@given(
    text=st.one_of(
        TEXTS, st.text("aab  \n", max_size=14), st.text(st.sampled_from("the café is 1000 日本"), max_size=40)
    )
)
def test_sentencepiece_models_encode_as_sentencepiece_does(path: Path, text: str) -> None:
    oracle, ours = sentencepiece_pair(path)
    if "\0" not in text:  # sentencepiece ends its input there
        assert ours.encode(text, add_special=False) == oracle.encode(text)


_PAIRS: dict[Path, tuple[Any, Tokenizer]] = {}


def sentencepiece_pair(path: Path) -> tuple[Any, Tokenizer]:
    if path not in _PAIRS:
        _PAIRS[path] = sentencepiece.SentencePieceProcessor(model_file=str(path)), open_tokenizer(path)
    return _PAIRS[path]


def test_added_tokens_strip_what_the_file_says() -> None:
    ours = open_tokenizer(PHI3)
    config = json.loads((PHI3 / "tokenizer_config.json").read_text())
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(PHI3 / "tokenizer.json"),
        **{role: config[role] for role in ("bos_token", "eos_token", "unk_token", "pad_token")},
    )
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids, ours.add_bos) == (32011, 1, (32000, 32007), False)
    assert set(oracle.all_special_ids) <= ours.special_ids
    for text in (
        "<|user|>\nHello <|end|>\n<|assistant|>\n",
        "<s>a</s>  b<|end|>\n\n<|endoftext|>\n",
        " x<|system|> y",
    ):
        assert ours.encode(text, parse_special=True) == oracle.encode(text)
        assert "<|user|>" in ours.decode(ours.encode("<|user|>"))


@pytest.mark.parametrize("adds", [None, True, False])
def test_a_byte_level_tokenizer_json(tmp_path: Path, vocab: Callable[[str], Tokenizer], adds: bool | None) -> None:
    with open_gguf(DATA / "vocab" / VOCABS["gpt-2"]) as file:
        backend = vocabulary_from_gguf(file.metadata).make_backend()
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 50256)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|endoftext|>", "add_bos_token": adds}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.add_bos is (adds is not False)
    for text, ids in cases("gpt-2"):
        assert tokenizer.encode(text) == ([] if adds is False else [50256]) + ids
        assert tokenizer.decode(ids) == text


def test_added_tokens_that_are_no_control_tokens_are_shown(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    added = {
        "32000": {"content": "<think>", "special": False},
        "32001": {"content": "<|end|>", "special": True, "rstrip": True},
        "2": {"content": "</s>", "special": True},
    }
    config = {"bos_token": "<s>", "eos_token": "<|end|>", "added_tokens_decoder": added, "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (32001,)
    assert tokenizer.encode("<think>x")[:2] == [1, 32000]
    assert tokenizer.decode([32000]) == "<think>"
    assert tokenizer.token_bytes(32001) == b""
    assert tokenizer.encode("<|end|>", parse_special=True, add_special=False) == [32001]
    config["added_tokens_decoder"] = {"32005": {"content": "<think>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="cannot have the id 32005"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("llama-bpe", "I'LL pay 12345$ \n\n now", ["I", "'LL", " pay", " ", "123", "45", "$", " \n\n", " now"]),
        ("qwen2", "I'LL pay 12345$ \n\n now", ["I", "'LL", " pay", " ", *"12345", "$", " \n\n", " now"]),
        ("gpt-2", "I'LL pay 12345$ now", ["I", "'", "LL", " pay", " 12345", "$", " now"]),
        ("phi-2", "it's 12", ["it", "'s", " 12"]),
        ("starcoder", "it's 123x", ["it", "'s", " ", "1", "2", "3", "x"]),
        ("falcon", "it's 12345, $5.", ["it", "'", "s", " ", "123", "45", ",", " ", "$", "5", "."]),
        ("default", "it's 12345, x", ["it", "'", "s", " ", "123", "45", ",", " x"]),
    ],
)
def test_pre_tokenizers(kind: str, text: str, words: list[str]) -> None:
    with open_gguf(DATA / "vocab" / VOCABS["gpt-2"]) as file:
        backend = vocabulary_from_gguf({**file.metadata, "tokenizer.ggml.pre": kind}).make_backend()
    cut = [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == words


GROUPS = json.loads((DATA / "vocab/pre_tokenizers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("group", GROUPS["groups"], ids=lambda group: group["names"][0])
def test_texts_are_cut_as_llama_cpp_cuts_them(group: dict[str, Any]) -> None:
    with open_gguf(DATA / "vocab" / VOCABS["gpt-2"]) as file:
        metadata = file.metadata
    texts = [*(text for text, _ in cases("gpt-2")), *GROUPS["more_texts"]]
    # Names with one group of ids mostly share one entry: one of each is tried.
    kinds = {id(PRE_TOKENIZERS[name]): name for name in group["names"]}
    for name in kinds.values():
        tokenizer = open_tokenizer({**metadata, "tokenizer.ggml.pre": name})
        for text, ids in zip(texts, group["ids"], strict=True):
            assert tokenizer.encode(text, add_special=False) == ids, (name, text)


def test_every_way_to_cut_is_compared_or_has_its_own_vocabulary() -> None:
    compared = {name for group in GROUPS["groups"] for name in group["names"]}
    # Falcon's own pieces are cut where its bytes look like digits, which llama.cpp does not do.
    assert set(PRE_TOKENIZERS) - compared == {"falcon"}


def spm_metadata(**changes: Any) -> dict[str, Any]:
    metadata = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "▁a", "<user>", "<x", ">"],
        "scores": [0.0, 0, 0, 0, -1, -2, -3, 0, -4, -5],
        "token_type": [2, 3, 3, 6, 1, 1, 1, 4, 1, 1],
    }
    metadata |= changes
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def test_sentencepiece_types_in_gguf() -> None:
    tokenizer = open_tokenizer(spm_metadata())
    assert tokenizer.encode("a<user>\na", add_special=False) == [6, 7, 4, 3, 5]
    assert tokenizer.decode([6, 7]) == "a<user>"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos, tokenizer.add_eos) == (1, (2,), True, False)
    no_prefix = open_tokenizer(spm_metadata(add_space_prefix=False, add_bos_token=False, add_eos_token=True))
    assert no_prefix.encode("a") == [5, 2]
    assert no_prefix.decode([6]) == " a"


def test_phi3_s_control_tokens_swallow_white_space() -> None:
    metadata = spm_metadata(tokens=["<unk>", "<s>", "<|end|>", "<0x0A>", "▁", "a", "▁a", "<user>", "<x", ">"])
    tokenizer = open_tokenizer({**metadata, "general.architecture": "phi3"})
    assert tokenizer.encode("<|end|>\n<s>", add_special=False, parse_special=True) == [2, 1]
    assert 2 in tokenizer.eos_ids


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"model": "bert"}, "tokenizer model 'bert'"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": []}, "empty vocabulary"),
        ({"scores": [1.0]}, "tokenizer.ggml.scores does not have one number"),
        ({"scores": 3}, "tokenizer.ggml.scores does not have one number"),
        ({"token_type": ["x"] * 10}, "tokenizer.ggml.token_type does not hold numbers"),
        ({"bos_token_id": 99}, "tokenizer.ggml.bos_token_id is no token id below 10"),
        ({"eos_token_id": "x"}, "tokenizer.ggml.eos_token_id is no token id"),
        ({"unknown_token_id": 10}, "tokenizer.ggml.unknown_token_id"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is no boolean"),
        ({"model": "gpt2", "pre": "martian", "merges": []}, "tokenizer.ggml.pre is 'martian'; known are"),
        ({"model": "gpt2"}, "tokenizer.ggml.merges is missing"),
        ({"model": "gpt2", "merges": ["ab"]}, "merge without two parts"),
        ({"model": "gpt2", "merges": ["q r"]}, "impossible tokenizer"),
    ],
)
def test_refuses_broken_metadata(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        open_tokenizer(spm_metadata(**changes))
    assert sentence in str(caught.value)


def test_refuses_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="has neither"):
        open_tokenizer(tmp_path)
    with pytest.raises(ModelFileError, match="no such tokenizer"):
        open_tokenizer(tmp_path / "none.model")
    for content in (b"", b"{", b"[]", b'{"model": 1}', b"[" * 100_000):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
            open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for content in (b"", b"aGVsbG8= 1\nd29ybGQ= 2\n", LLAMA2.read_bytes()[:1000], b"\xff" * 50):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ModelFileError, match=r"tokenizer\.model"):
            open_tokenizer(tmp_path)


@settings(max_examples=150)
@given(at=st.integers(0, 7999), new=st.binary(min_size=1, max_size=4))
def test_a_mutated_sentencepiece_model_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, new: bytes
) -> None:
    content = bytearray((STORIES / "hf/tokenizer.model").read_bytes())
    content[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "mutated.model"
    path.write_bytes(content)
    refusal = f"{path}: "
    try:
        assert open_tokenizer(path).vocab_size > 0
    except ModelFileError as error:
        refusal = str(error)
    assert refusal.startswith(f"{path}: ")
