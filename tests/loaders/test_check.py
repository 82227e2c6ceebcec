"""A model's headers alone tell whether it can be loaded."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest

import serve_app
from serve_app.errors import ModelFileError
from serve_app.loaders import check
from serve_app.loaders.model_files import resolve
from serve_app.options import ModelSource

ASSET = Path(serve_app.__file__).parent / "assets" / "stories3M-Q8_0.gguf"


def broken(folder: Path, old: bytes, new: bytes) -> ModelSource:
    content = ASSET.read_bytes()
    assert old in content
    assert len(old) == len(new)
    (folder / "bad.gguf").write_bytes(content.replace(old, new))
    return ModelSource(model=str(folder), kind="gguf", files=("bad.gguf",))


def test_the_embedded_model_passes():
    check.check_model(resolve(ModelSource()))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"blk.0.attn_q.weight", b"blk.0.attn_X.weight", "blk.0.attn_q.weight"),
        (b"blk.1.ffn_norm.weight", b"blk.1.ffn_morm.weight", "blk.1.ffn_norm.weight"),
        (b"llama.block_count", b"llama.block_bount", "block_count"),
    ],
)
def test_what_is_missing_is_named_with_its_file(tmp_path, old, new, sentence):
    with pytest.raises(ModelFileError, match=sentence) as caught:
        check.check_model(resolve(broken(tmp_path, old, new)))
    assert "bad.gguf" in str(caught.value)


@pytest.mark.parametrize("is_broken", [False, True])
def test_as_a_program_it_exits_with_2_and_the_sentence(tmp_path, monkeypatch, capsys, is_broken):
    source = broken(tmp_path, b"blk.0.attn_q.weight", b"blk.0.attn_X.weight") if is_broken else ModelSource()
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps([asdict(ModelSource()), asdict(source)])))
    assert check.main() == (2 if is_broken else 0)
    assert ("blk.0.attn_q.weight" in capsys.readouterr().err) == is_broken
