import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ModelFileError
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.loaders.weight_files import EMBEDDED_MODEL
from serve_app.options import ModelSource

MODELS = Path(__file__).parents[1] / "data" / "models"
Write = Callable[..., Path]


def found(**source: Any) -> ModelFiles:
    return resolve(ModelSource(**source))


def test_without_a_name_it_is_the_embedded_model() -> None:
    files = found()
    assert files.weight_files == (EMBEDDED_MODEL,)
    assert (files.kind, files.model_name, files.max_seq_len) == ("gguf", "stories3M-Q8_0", 512)
    assert files.architecture == "llama"
    assert files.eos_ids == (2, 1)
    assert files.tokenizer_source is files.gguf_metadata
    assert files.sampling_defaults().temperature == 1.0


def test_the_embedded_models_are_named_with_origin_and_licence() -> None:
    names = sorted(p.name for p in EMBEDDED_MODEL.parent.iterdir())
    assert names == ["LICENSE", "README.md", "stories.txt", "stories260K-Q8_0.gguf", "stories3M-Q8_0.gguf"]
    text = (EMBEDDED_MODEL.parent / "README.md").read_text()
    assert all(name in text for name in names if name.endswith(".gguf"))
    assert "MIT" in text


def test_a_folder() -> None:
    folder = MODELS / "stories3M" / "hf"
    files = found(model=str(folder))
    assert (files.kind, files.model_name, files.max_seq_len) == ("plain", "hf", 512)
    assert files.weight_files == (folder / "model.safetensors",)
    assert files.tokenizer_source == files.folder == folder
    assert files.architecture == "LlamaForCausalLM"
    assert files.eos_ids == (2, 1)
    assert files.sampling_defaults().temperature == 0.0
    assert files.gguf_metadata is None


@pytest.mark.parametrize(
    "source",
    [
        {"model": str(MODELS / "stories3M" / "stories3M-F32.gguf")},
        {"model": str(MODELS / "stories3M"), "files": ("stories3M-F32.gguf",)},
        {"model": str(MODELS / "stories3M"), "files": ("*F32*",), "kind": "gguf"},
        {"files": (str(MODELS / "stories3M" / "stories3M-F32.gguf"),)},
        {"model": str(MODELS), "files": ("stories3M/*F32.gguf",)},
        {"model": str(MODELS / "stories260K"), "files": (str(MODELS / "stories3M" / "*F3?.gguf"),)},
    ],
)
def test_ways_to_name_a_gguf(source: dict[str, Any]) -> None:
    files = found(**source)
    assert files.weight_files == (MODELS / "stories3M" / "stories3M-F32.gguf",)
    assert (files.kind, files.folder) == ("gguf", MODELS / "stories3M")


def test_a_glob_is_taken_literally_in_the_folders_name(write_gguf: Write) -> None:
    folder = write_gguf().parent / "[odd] *"
    folder.mkdir()
    shutil.copy(write_gguf(), folder / "one.gguf")
    shutil.copy(write_gguf(), folder / "two.gguf")
    assert found(model=str(folder), files=("o*.gguf",)).weight_files == (folder / "one.gguf",)


def test_options_pass_and_lower_the_context() -> None:
    files = found(max_seq_len=100, dtype="bf16", jinja_explicit="x.jinja", chat_template="y.json")
    assert (files.max_seq_len, files.dtype) == (100, "bf16")
    assert (files.jinja_explicit, files.chat_template) == ("x.jinja", "y.json")
    assert found(max_seq_len=100_000).max_seq_len == 512


def test_a_tokenizer_from_elsewhere() -> None:
    folder = MODELS / "stories260K" / "hf"
    assert found(tokenizer=str(folder)).tokenizer_source == folder
    with pytest.raises(ModelFileError, match=r"^\./none: no such file or folder, and no valid hub id$"):
        found(tokenizer="./none")


def test_a_gguf_without_tokenizer_takes_its_folders(write_gguf: Write) -> None:
    path = write_gguf()
    assert found(model=str(path)).tokenizer_source == path.parent


def test_the_end_ids_of_all_files_are_joined(write_folder: Write) -> None:
    folder = write_folder(config={"eos_token_id": 7})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    assert found(model=str(folder)).eos_ids == (7, 3)


def test_an_index_names_the_shards(write_folder: Write) -> None:
    folder = write_folder()
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [p.name for p in found(model=str(folder)).weight_files] == ["model-00001-of-00001.safetensors"]


def test_no_torch_and_no_hub_for_a_local_model() -> None:
    code = (
        "import sys; from serve_app.loaders.model_files import resolve; from serve_app.options import ModelSource;"
        "resolve(ModelSource()); print(sorted({'torch', 'huggingface_hub', 'pydantic', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_it_survives_pickling() -> None:
    files = found(model=str(MODELS / "stories3M" / "hf"))
    assert pickle.loads(pickle.dumps(files)) == files


def test_refusals_of_names(tmp_path: Path) -> None:
    gguf = str(MODELS / "stories3M" / "stories3M-F32.gguf")
    (tmp_path / "empty").mkdir()
    for source, sentence in [
        ({"model": "./none"}, r"^\./none: no such file or folder, and no valid hub id$"),
        ({"model": "a/b/c"}, "^a/b/c: no such file or folder, and no valid hub id$"),
        ({"model": str(tmp_path / "empty")}, "empty: holds neither .safetensors nor .gguf files$"),
        ({"model": str(MODELS / "stories3M")}, "stories3M: holds several GGUF models, choose one with -f"),
        ({"model": gguf, "files": ("x",)}, "F32.gguf: -f names files of a folder or repository"),
        ({"model": gguf, "kind": "plain"}, "F32.gguf: is no file for the model kind plain$"),
        ({"files": ("none/x.gguf",)}, "no file matches -f x.gguf"),
        ({"model": str(MODELS / "stories3M" / "hf"), "kind": "gguf"}, "hf: holds no .gguf file$"),
    ]:
        with pytest.raises(ModelFileError, match=sentence):
            found(**source)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "{", "config.json: is no valid JSON"),
        ("config.json", "[]", "config.json: is no JSON object$"),
        ("config.json", None, r"config.json: cannot be read \(No such file or directory\)$"),
        ("config.json", "[" * 100_000, "config.json: is no valid JSON"),
        (
            "generation_config.json",
            '{"eos_token_id": "x"}',
            "generation_config.json: key 'eos_token_id' is no token id$",
        ),
        ("model.safetensors.index.json", "{}", "index.json: key 'weight_map' is missing or no JSON object$"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', "index.json: tensor 'a' is in no file of"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "index.json: tensor 'a' is in no file of"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b"}}', r"tiny/b: shard named by .* is missing$"),
    ],
)
def test_refusals_of_files(file: str, content: str | None, sentence: str, write_folder: Write) -> None:
    folder = write_folder()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ModelFileError, match=sentence):
        found(model=str(folder))
