"""Chat templates in every place that a folder or a GGUF has for them, found as transformers finds them."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

from serve_app.errors import ModelFileError
from serve_app.gguf_file import open_gguf
from serve_app.text.template_files import gguf_values, templates_of_folder, templates_of_gguf, write_templates

TOKENIZER = Path(__file__).parents[1] / "data/models/stories260K/hf/tokenizer.json"
LISTED = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "listed tools"}]
LAYOUTS: dict[str, dict[str, Any]] = {
    "text": {"tokenizer_config.json": {"chat_template": "config"}},
    "list": {"tokenizer_config.json": {"chat_template": LISTED}},
    "file": {"chat_template.jinja": "file", "tokenizer_config.json": {"chat_template": LISTED}},
    "several files": {
        "chat_template.jinja": "file",
        "additional_chat_templates/tool_use.jinja": "more tools",
        "additional_chat_templates/rag.jinja": "more rag",
        "tokenizer_config.json": {"chat_template": "config"},
    },
    "additional ones alone": {
        "additional_chat_templates/tool_use.jinja": "more tools",
        "tokenizer_config.json": {"chat_template": "config"},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folders_are_those_of_transformers(layout: str, tmp_path: Path) -> None:
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.json")
    for name, content in LAYOUTS[layout].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template
    found = templates_of_folder(tmp_path)
    assert found is not None
    assert found.sources == ({"default": theirs} if isinstance(theirs, str) else theirs)
    again = tmp_path / "again"
    again.mkdir()
    write_templates(again, found.sources)
    written = templates_of_folder(again)
    assert written is not None
    assert written.sources == found.sources


def test_a_ggufs_keys_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_chat_template(LISTED)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with open_gguf(tmp_path / "a.gguf") as file:
        found = templates_of_gguf(file.metadata)
        assert found is not None
        assert found.sources == {"default": "listed", "tool_use": "listed tools"}
        assert gguf_values(found.sources) == {k: v for k, v in file.metadata.items() if "template" in k}
    assert templates_of_gguf({}) is None


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a\0b"])
def test_names_that_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be a file's"):
        write_templates(tmp_path, {"default": "x", name: "y"})
    assert not (tmp_path / "evil.jinja").exists()
