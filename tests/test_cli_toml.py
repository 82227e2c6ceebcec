"""mistral.rs's selector files."""

from pathlib import Path

import pytest

from serve_app import __main__, cli
from serve_app.config import AppConfig

SPECULATIVE_GGUF = """
[model]
model_id = "org/big-model"
arch = "mistral"

[speculative]
gamma = 32

[speculative.draft_model]
tok_model_id = "org/small-model"
quantized_model_id = "org/small-model-GGUF"
quantized_filename = "small-model.Q2_K.gguf"
"""
EVERY_KEY = """
tokenizer_json = "tokens"

[model]
model_id = "M"
arch = "llama"
dtype = "bf16"
max_seq_len = 2048
max_batch_size = 4
hf_cache_path = "hub"
in_situ_quant = "Q4K"
organization = "moqe"
imatrix = "i.dat"
topology = "t.yml"

[speculative]
gamma = 5
draft_sampling = "sampled"

[speculative.draft_model]
quantized_model_id = "D"
quantized_filename = "a.bin"
tok_model_id = "T"
gqa = 8
in_situ_quant = "Q8_0"
calibration_file = "c.txt"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "models.toml"


def config(file: Path, text: str, *words: str) -> AppConfig:
    file.write_text(text)
    invocation = cli.parse([*words, "toml", "-f", str(file)])
    assert invocation is not None
    return invocation.config


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert __main__.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_target_and_draft_of_different_kinds(file: Path) -> None:
    assert config(file, SPECULATIVE_GGUF).to_args() == {
        "model": {"model": "org/big-model", "kind": "plain", "arch": "mistral"},
        "speculation": {
            "use": "auto",
            # Theirs says how many; ours at most how many.
            "max_tokens": 16,
            "draft": {
                "model": "org/small-model-GGUF",
                "kind": "gguf",
                "files": ["small-model.Q2_K.gguf"],
                "tokenizer": "org/small-model",
            },
        },
    }


def test_every_key_has_its_place(file: Path) -> None:
    args = config(file, EVERY_KEY).to_args()
    isq = {"type": "Q4K", "experts_only": True, "imatrix": "i.dat", "topology": "t.yml"}
    model = {"model": "M", "kind": "plain", "arch": "llama", "tokenizer": "tokens", "dtype": "bf16"}
    assert args["model"] == {**model, "max_seq_len": 2048, "hf_cache": "hub", "isq": isq}
    assert args["speculation"]["draft"] == {
        "model": "D", "kind": "ggml", "files": ["a.bin"], "tokenizer": "T", "gqa": 8, "hf_cache": "hub",
        "isq": {"type": "Q8_0", "calibration_file": "c.txt"},
    }  # fmt: skip
    assert "max_tokens" not in args["speculation"]  # the default
    assert args["speculation"]["draft_sampling"] == "sampled"


@pytest.mark.parametrize("names", ["a.gguf b.gguf", "a.gguf;b.gguf"])
def test_a_model_alone_and_its_shards(file: Path, names: str) -> None:
    text = f'[model]\nquantized_model_id = "D"\nquantized_filename = "{names}"\n'
    assert config(file, text).to_args() == {"model": {"model": "D", "kind": "gguf", "files": ["a.gguf", "b.gguf"]}}
    assert config(file, text, "chat").model.files == ("a.gguf", "b.gguf")


def test_options_say_what_the_file_does_not(file: Path) -> None:
    text = '[model]\nmodel_id = "M"\n[speculative]\ngamma = 4\ndraft_model = {model_id = "D"}\n'
    words = "--isq Q4K --dtype f32 --draft-isq Q8_0 --draft-deadline-ms 9 --speculation draft --port 80"
    args = config(file, text, *words.split()).to_args()
    assert args["model"] == {"model": "M", "kind": "plain", "dtype": "f32", "isq": {"type": "Q4K"}}
    draft = {"model": "D", "kind": "plain", "isq": {"type": "Q8_0"}}
    assert args["speculation"] == {"use": "draft", "max_tokens": 4, "deadline_ms": 9.0, "draft": draft}
    assert args["http"] == {"port": 80}
    added = config(file, '[model]\nmodel_id = "M"', "-d", "D").to_args()["speculation"]
    assert added == {"use": "auto", "draft": {"model": "D"}}


MODEL = '[model]\nmodel_id = "M"\n'
DRAFT = MODEL + "[speculative]\ngamma = 4\n[speculative.draft_model]\n"


@pytest.mark.parametrize(
    ("text", "words", "sentence"),
    [
        ("[model", "", "is not TOML: "),
        ("", "", "the file needs the table model."),
        ("model = 3", "", "the file needs the table model."),
        ("[model]", "", "[model] names no model: give model_id or quantized_model_id."),
        ("[model]\nmodel_ID = 'M'", "", "there is no key model_ID in [model]; did you mean model_id?"),
        (MODEL + "dtyp = 'f16'", "", "there is no key dtyp in [model]; did you mean dtype?"),
        (MODEL + "[speculativ]", "", "there is no key speculativ in the file; did you mean speculative?"),
        (MODEL + "[zzz]", "", "there is no key zzz in the file."),
        (DRAFT + "model_id = 'D'\ngama = 4", "", "there is no key gama in [speculative.draft_model]"),
        (MODEL + "[speculative]\ngama = 4", "", "there is no key gama in [speculative]; did you mean gamma?"),
        (MODEL + "[speculative]\ngamma = 4", "", "[speculative] needs the table draft_model."),
        (MODEL + "[speculative]\ndraft_model = {model_id = 'D'}", "", "[speculative] needs the key gamma."),
        (DRAFT, "", "[speculative.draft_model] names no model"),
        (MODEL + "dtype = 16", "", "dtype in [model] should be a string."),
        (MODEL + "dtype = 'f8'", "", "dtype in [model] should be 'auto', "),
        (MODEL + "in_situ_quant = 'Q9K'", "", "in_situ_quant in [model] names no type"),
        (MODEL + "organization = 'best'", "", "organization in [model] should be default or moqe."),
        (MODEL + "max_seq_len = true", "", "max_seq_len in [model] should be a whole number."),
        (MODEL + "max_seq_len = 0", "", "max_seq_len in [model] should be greater than 0."),
        (MODEL + "gqa = 8", "", "gqa in [model] does not go with model_id."),
        (MODEL + "quantized_model_id='D'", "", "quantized_model_id in [model] does not go with model_id."),
        (MODEL + "[speculative]\ngamma = 0\ndraft_model = {model_id = 'D'}", "",
         "gamma in [speculative] should be greater than or equal to 1."),
        (MODEL + "[speculative]\ngamma = 1\ndraft_sampling = 'x'\ndraft_model = {model_id = 'D'}", "",
         "draft_sampling in [speculative] should be 'greedy' or 'sampled'."),
        (MODEL + "[speculative]\ngamma = 1\ndraft_sampling = 1\ndraft_model = {model_id = 'D'}", "",
         "draft_sampling in [speculative] should be a string."),
        (DRAFT + "model_id = 'D'\ndtype = 'f8'", "", "dtype in [speculative.draft_model] should be 'auto', "),
        (MODEL + "from_uqff = 'x'", "", "from_uqff in [model] is for UQFF, not a part of this version."),
        ("[model]\nxlora_model_id = 'X'\norder = 'o'", "", "xlora_model_id in [model] is for the kind x-lora"),
        (MODEL + "adapter_model_ids = 'a'", "", "adapter_model_ids in [model] is for the kind lora"),
        (MODEL + "max_edge = 4", "", "max_edge in [model] is for the kind vision-plain"),
        (MODEL + "[anymoe]", "", "anymoe in the file is for AnyMoE"),
        (MODEL + "dtype = 'f16'", "--dtype f32", "dtype in [model] says what --dtype says too."),
        (DRAFT + "model_id = 'D'", "-n 3", "gamma in [speculative] says what --num-draft-tokens says too."),
        (DRAFT + "model_id = 'D'", "-d E", "model_id in [speculative.draft_model] says what --draft-model-id says"),
        (MODEL + "organization = 'moqe'", "--isq Q4K --isq-organization pure", "what --isq-organization says too."),
        (DRAFT + "model_id = 'D'", "quality", "in [speculative.draft_model] is not for this command."),
        (MODEL + "in_situ_quant = 'Q4K'", "quality", "in_situ_quant in [model] is not for this command."),
        (MODEL, "-m M", "The option -m does not go with the kind toml"),
        (MODEL, "-f other.toml", "The kind toml needs one file"),
        (MODEL, "speculative", "The kind speculative needs a draft model"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key(
    file: Path, text: str, words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    error = refusal(capsys, *words.split(), "toml", "-f", str(file))
    assert sentence in error
    assert str(file) in error or sentence.startswith("The ")


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read: No such file" in refusal(capsys, "toml", "-f", str(tmp_path / "none.toml"))
    (tmp_path / "latin").write_bytes(b"[model]\nmodel_id = '\xe9'")
    assert "is not TOML" in refusal(capsys, "toml", "-f", str(tmp_path / "latin"))
    assert "The kind toml needs one file" in refusal(capsys, "toml")
