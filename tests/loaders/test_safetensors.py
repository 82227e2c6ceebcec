import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from serve_app.errors import ModelFileError
from serve_app.loaders.safetensors import SafetensorsCheckpoint

MODELS = Path(__file__).parents[1] / "data" / "models"


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("model", ["stories260K", "stories3M"])
def test_reads_what_the_library_reads(model: str) -> None:
    path = MODELS / model / "hf" / "model.safetensors"
    checkpoint = SafetensorsCheckpoint([path])
    expected = load_file(path)
    assert {t.name for t in checkpoint.stored()} == set(expected)
    for name, array in expected.items():
        stored = checkpoint.find(name)
        assert stored is not None
        assert (stored.form.name, stored.shape, stored.file) == ("F32", array.shape, str(path))
        np.testing.assert_array_equal(stored.data.view(np.float32).reshape(array.shape), array)


def test_shards_make_one_checkpoint(tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float16)}, tmp_path / "1.safetensors")
    save_file({"b": np.zeros((2, 2), np.float32)}, tmp_path / "2.safetensors")
    checkpoint = SafetensorsCheckpoint([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert [(t.name, t.form.name) for t in checkpoint.stored()] == [("a", "F16"), ("b", "F32")]
    assert checkpoint.find("c") is None
    assert checkpoint.label.endswith("1.safetensors")


def test_the_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("1", "2"):
        save_file({"a": np.ones(3, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelFileError, match=r"2\.safetensors: tensor 'a' is in more than one file"):
        SafetensorsCheckpoint([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


def test_tensors_are_read_only_views_of_the_file() -> None:
    stored = SafetensorsCheckpoint([MODELS / "stories260K" / "hf" / "model.safetensors"]).find("model.norm.weight")
    assert stored is not None
    assert not stored.data.flags.writeable
    assert not stored.data.flags.owndata


def test_integers_are_only_an_error_when_they_are_asked_for(tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float32), "ids": np.ones(3, np.int64)}, tmp_path / "m.safetensors")
    checkpoint = SafetensorsCheckpoint([tmp_path / "m.safetensors"])
    assert [t.name for t in checkpoint.stored()] == ["a"]
    with pytest.raises(ModelFileError, match=r"m\.safetensors: tensor 'ids' has type I64; supported are F32"):
        checkpoint.find("ids")


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing file": (lambda p: p, "cannot be read"),
    "empty": (lambda p: write_bytes(p, b""), "is empty"),
    "seven bytes": (lambda p: write_bytes(p, b"1234567"), "truncated"),
    "absurd header length": (lambda p: write_raw(p, {}, length=2**63), "header's length"),
    "header beyond the file": (lambda p: write_raw(p, {}, length=100), "header's length"),
    "no json": (lambda p: write_raw(p, b"{nope"), "no valid JSON"),
    "no utf-8": (lambda p: write_raw(p, b'{"\xff": 1}'), "no valid JSON"),
    "deep json": (lambda p: write_raw(p, b"[" * 100_000), "no valid JSON"),
    "a list": (lambda p: write_raw(p, []), "no JSON object"),
    "a name twice": (lambda p: write_raw(p, b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    "no entry": (lambda p: write_raw(p, {"a": 3}), "tensor 'a' is described by no JSON object"),
    "unknown type": (lambda p: write_raw(p, {"a": entry("F12")}), "tensor 'a' has the unknown type 'F12'"),
    "no type": (lambda p: write_raw(p, {"a": entry(None)}), "tensor 'a' has the unknown type None"),  # type: ignore[arg-type]
    "negative dimension": (lambda p: write_raw(p, {"a": entry(shape=[-2])}), "tensor 'a' has the impossible shape"),
    "boolean dimension": (lambda p: write_raw(p, {"a": entry(shape=[True])}), "tensor 'a' has the impossible shape"),
    "nine dimensions": (lambda p: write_raw(p, {"a": entry(shape=[1] * 9)}), "tensor 'a' has the impossible shape"),
    "absurd dimensions": (
        lambda p: write_raw(p, {"a": entry(shape=[2**62] * 8)}, b"x" * 8),
        "tensor 'a' of type F32 and shape .* does not fit its 8 bytes",
    ),
    "shape and size differ": (lambda p: write_raw(p, {"a": entry(shape=[3])}, b"x" * 8), "does not fit its 8 bytes"),
    "truncated data": (lambda p: write_raw(p, {"a": entry()}, b"1234"), r"tensor 'a' lies at bytes \[0, 8\], outside"),
    "offsets backwards": (lambda p: write_raw(p, {"a": entry(offsets=[8, 0])}, b"x" * 8), "tensor 'a' lies at"),
    "three offsets": (lambda p: write_raw(p, {"a": entry(offsets=[0, 8, 8])}, b"x" * 8), "tensor 'a' lies at"),
    "overlap": (
        lambda p: write_raw(p, {"a": entry(), "b": entry(offsets=[4, 12])}, b"x" * 12),
        "tensors 'a' and 'b' overlap",
    ),
}


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_in_one_sentence(case: str, tmp_path: Path) -> None:
    make, expected = BAD[case]
    path = make(tmp_path / "bad.safetensors")
    with pytest.raises(ModelFileError, match=expected) as caught:
        SafetensorsCheckpoint([path])
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_random_headers_never_end_in_another_error(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"a": np.ones((4, 4), np.float32), "b": np.ones(7, np.float16)}, good)
    raw = bytearray(good.read_bytes())
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(400):
        fuzzed = bytearray(raw)
        for place in rng.integers(0, len(raw), rng.integers(1, 6)):
            fuzzed[place] = rng.integers(0, 256)
        path = write_bytes(tmp_path / "fuzzed.safetensors", bytes(fuzzed[: rng.integers(1, len(raw) + 1)]))
        try:
            SafetensorsCheckpoint([path])
            outcomes.add("read")
        except ModelFileError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
