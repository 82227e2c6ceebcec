"""`sirocco quantize` with another tokenizer, architecture or chat template: the files have them, as if served so."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from serve_app.__main__ import main
from serve_app.engine.llm import LLM
from serve_app.gguf_file import open_gguf
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.options import ModelSource
from serve_app.text.chat_template import open_chat_template
from serve_app.text.tokenizer import open_tokenizer

MODELS = Path(__file__).parents[1] / "data" / "models"
STORIES = MODELS / "stories260K"
SOURCES = {"gguf": STORIES / "stories260K-F32.gguf", "folder": STORIES / "hf"}
TEXT = "Once upon a time, Zoë said  “no”.\n"


def quantise(source: Path, target: Path, *options: str) -> ModelFiles:
    assert main(["quantize", "-m", str(source), "--isq", "Q8_0", "-o", str(target), *options]) == 0
    return resolve(ModelSource(model=str(target)))


def template_of(files: ModelFiles) -> str | None:
    found = open_chat_template(files, open_tokenizer(files.tokenizer_source))
    return None if found is None else found.source


@pytest.fixture
def other_tokenizer(tmp_path: Path) -> Path:
    """The model's own, in which two pieces have exchanged their ids and BOS is not wanted."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    content = json.loads((STORIES / "hf/tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = "▁upon", "▁time"
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((STORIES / "hf/tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    return folder


@pytest.mark.parametrize("target", ["a.gguf", "a"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", ["folder", "file", "gguf"])
def test_another_tokenizer(form: str, source: str, target: str, other_tokenizer: Path, tmp_path: Path) -> None:
    given = other_tokenizer
    if form == "file":
        given = (other_tokenizer / "tokenizer.json").rename(other_tokenizer / "another.json")
    if form == "gguf":
        given = tmp_path / "tokenizer.gguf"
        quantise(STORIES / "hf", given, "--tokenizer", str(other_tokenizer))
    made = quantise(SOURCES[source], tmp_path / target, "--tokenizer", str(given))
    own, other, found = (open_tokenizer(s) for s in (STORIES / "hf", given, made.tokenizer_source))
    ids = other.encode(TEXT)
    assert found.encode(TEXT) == ids != own.encode(TEXT)
    assert (found.bos_id, found.eos_id, found.add_bos) == (other.bos_id, other.eos_id, False)
    assert found.decode(ids) == TEXT


def test_a_tokenizer_for_a_folder_that_has_none(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(STORIES / "hf", bare)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    assert main(["quantize", "-m", str(bare), "--isq", "Q8_0", "-o", str(tmp_path / "no.gguf")]) == 2
    made = quantise(bare, tmp_path / "a.gguf", "--tokenizer", str(STORIES / "hf"))
    assert open_tokenizer(made.tokenizer_source).encode(TEXT) == open_tokenizer(STORIES / "hf").encode(TEXT)


@pytest.mark.parametrize("source", SOURCES)
def test_a_ggufs_tokenizer_has_a_token_for_each_row(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, target = MODELS.parent / "vocab/ggml-vocab-gpt-2.gguf", tmp_path / "a.gguf"
    options = ["-m", str(SOURCES[source]), "--isq", "8", "-o", str(target), "--tokenizer", str(other)]
    assert main(["quantize", *options]) == 2
    assert "has 50257 tokens, but the model's embedding 512 rows" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("target", ["a.gguf", "a"])
@pytest.mark.parametrize("source", SOURCES)
def test_another_chat_template(source: str, target: str, tmp_path: Path) -> None:
    explicit = tmp_path / "explicit.jinja"
    explicit.write_text("{{ 'explicit' }}")
    made = quantise(SOURCES[source], tmp_path / target, "--chat-template", "{{ 'other' }}")
    assert template_of(made) == "{{ 'other' }}"
    made = quantise(SOURCES[source], tmp_path / target, "-c", "{{ 'other' }}", "-j", str(explicit))
    assert template_of(made) == "{{ 'explicit' }}"


def test_broken_templates_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, sentence in (("{% if %}", "does not compile"), (str(tmp_path / "no.json"), "cannot be read")):
        target = tmp_path / "a.gguf"
        assert main(["quantize", "-m", str(SOURCES["gguf"]), "--isq", "8", "-o", str(target), "-c", option]) == 2
        assert sentence in capsys.readouterr().err
        assert not target.exists()


def test_all_templates_of_a_folder_come_along(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(STORIES / "hf", folder)
    (folder / "chat_template.jinja").write_text("{{ 'own' }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")
    quantise(folder, tmp_path / "a")
    assert (tmp_path / "a/additional_chat_templates/tool_use.jinja").read_text() == "{{ 'tools' }}"
    made = quantise(tmp_path / "a", tmp_path / "a.gguf")
    assert made.gguf_metadata is not None
    assert {k: v for k, v in made.gguf_metadata.items() if "template" in k} == {
        "tokenizer.chat_template": "{{ 'own' }}",
        "tokenizer.chat_template.tool_use": "{{ 'tools' }}",
        "tokenizer.chat_templates": ["tool_use"],
    }
    back = quantise(tmp_path / "a.gguf", tmp_path / "b")
    assert template_of(back) == "{{ 'own' }}"
    assert (back.folder / "additional_chat_templates/tool_use.jinja").read_text() == "{{ 'tools' }}"
    # An option's is the only one, as when it is served.
    quantise(folder, tmp_path / "a", "-c", "{{ 'other' }}")
    assert not (tmp_path / "a/additional_chat_templates").exists()


@pytest.mark.parametrize("target", ["a.gguf", "a"])
@pytest.mark.parametrize("source", SOURCES)
def test_another_architecture(source: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that say one which is not known are read, and written, as the one that is named."""
    if source == "folder":
        given = tmp_path / "odd"
        shutil.copytree(STORIES / "hf", given)
        config = json.loads((given / "config.json").read_text())
        (given / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    else:
        given = tmp_path / "odd.gguf"
        raw = SOURCES["gguf"].read_bytes()
        given.write_bytes(
            raw.replace(b"llama.", b"oddly.").replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0oddly", 1)
        )
        with open_gguf(given) as file:
            assert file.metadata["general.architecture"] == "oddly"
    made = quantise(given, tmp_path / target, "-a", "llama")
    expected = quantise(SOURCES[source], tmp_path / f"expected-{target}")
    assert made.architecture == expected.architecture
    assert (made.max_seq_len, made.eos_ids) == (expected.max_seq_len, expected.eos_ids)
    with LLM(str(tmp_path / target)) as ours, LLM(str(tmp_path / f"expected-{target}")) as theirs:
        ids = ours.tokenizer.encode(TEXT)
        assert torch.equal(ours.logits(ids), theirs.logits(ids))


def test_what_stays_must_fit_into_the_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A topology quantises one layer; the others keep their types, of which a GGUF must have each."""
    topology = tmp_path / "topology.yaml"
    topology.write_text("0: {isq: Q8_0}\n")
    quantised = tmp_path / "hqq"
    assert main(["quantize", "-m", str(MODELS / "stories3M/hf"), "--isq", "HQQ4", "-o", str(quantised)]) == 0
    command = ["quantize", "-m", str(quantised), "--topology", str(topology), "-o"]
    assert main([*command, str(tmp_path / "a.gguf")]) == 2
    message = capsys.readouterr().err
    assert "stays as it is. HQQ" in message
    assert "cannot be written as .gguf" in message
    assert not (tmp_path / "a.gguf").exists()
    assert main([*command, str(tmp_path / "folder")]) == 0
    with LLM(str(tmp_path / "folder")) as llm:
        assert torch.isfinite(llm.logits(llm.tokenizer.encode(TEXT))).all()
