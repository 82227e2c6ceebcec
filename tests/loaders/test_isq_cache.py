"""Kept results of in-situ quantization: used again when nothing has changed, whole or not there, safe among many."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_app.errors import ModelFileError
from serve_app.loaders.isq import prepare
from serve_app.loaders.isq_importance import chunk_tokens
from serve_app.loaders.load import LoadedModel, load_model
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.loaders.opening import open_checkpoint
from serve_app.loaders.weight_files import EMBEDDED_MODEL
from serve_app.options import IsqOptions, ModelSource
from serve_app.quant.imatrix import Importance, write_imatrix
from tests.loaded_weights import same

STORIES = Path(__file__).parents[1] / "data" / "models" / "stories3M"
FOLDER, GGUF = STORIES / "hf", STORIES / "stories3M-F32.gguf"


def load(path: Path, **isq: Any) -> LoadedModel:
    files = resolve(ModelSource(model=str(path), isq=IsqOptions(**isq) if isq else None))
    return load_model(files, dtype="auto", device="cpu")


def refuse(*_: Any) -> None:
    raise AssertionError("something was quantised")


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("source", "isq"), [(FOLDER, "Q4_K_M"), (GGUF, "Q4_K_M"), (GGUF, "HQQ4")])
def test_the_second_start_maps_the_result(
    source: Path, isq: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(source, type=isq)
    first = load(source, type=isq, cache=str(tmp_path / "new" / "cache"))
    [name] = kept(tmp_path / "new" / "cache")
    assert isq in name
    monkeypatch.setattr("serve_app.loaders.recode.requantize", refuse)
    second = load(source, type=isq, cache=str(tmp_path / "new" / "cache"))
    assert same(first.model, expected.model)
    assert same(second.model, expected.model)
    assert expected.fingerprint == first.fingerprint == second.fingerprint
    assert first.isq is not None
    assert second.isq is not None
    assert [first.isq.is_cached, second.isq.is_cached] == [False, True]
    assert (first.isq.bytes_after, first.isq.num_tensors) == (second.isq.bytes_after, second.isq.num_tensors)


def test_a_folders_result_is_the_file_of_the_quantised_folder(tmp_path: Path) -> None:
    from serve_app.__main__ import main

    load(FOLDER, type="Q4K", cache=str(tmp_path / "cache"))
    assert main(["quantize", "-m", str(FOLDER), "--isq", "Q4K", "-o", str(tmp_path / "a")]) == 0
    [name] = kept(tmp_path / "cache")
    assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_whatever_decides_the_bytes_gives_another_file(tmp_path: Path) -> None:
    source, cache = tmp_path / "m.gguf", tmp_path / "cache"
    shutil.copy(GGUF, source)
    write_imatrix(tmp_path / "a.dat", {"blk.0.attn_q.weight": np.ones(256, np.float32)})
    write_imatrix(tmp_path / "b.dat", {"blk.0.attn_q.weight": np.full(256, 2, np.float32)})
    (tmp_path / "t.yml").write_text("0: {isq: Q8_0}")
    ways: list[dict[str, Any]] = [
        {"type": "Q4K"},
        {"type": "Q5K"},
        {"type": "Q4K", "is_pure": True},
        {"type": "Q4K", "imatrix": str(tmp_path / "a.dat")},
        {"type": "Q4K", "imatrix": str(tmp_path / "b.dat")},
        {"type": "Q4K", "topology": str(tmp_path / "t.yml")},
    ]
    for number, way in enumerate(ways):
        load(source, **way, cache=str(cache))
        assert len(kept(cache)) == number + 1
    load(source, type="q4_k", cache=str(cache))
    assert len(kept(cache)) == len(ways)
    os.utime(source, ns=(0, source.stat().st_mtime_ns + 1))
    load(source, type="Q4K", cache=str(cache))
    assert len(kept(cache)) == len(ways) + 1


def test_a_calibration_is_of_a_tokenizer_and_a_length(tmp_path: Path) -> None:
    """The same text in other tokens, or read in other chunks, gives another importance; read once, it is kept."""
    text, cache, lengths = tmp_path / "text.txt", tmp_path / "cache", []
    text.write_text("Once upon a time")
    shutil.copytree(FOLDER, tmp_path / "model")
    shutil.copytree(FOLDER, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    (tmp_path / "other/tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))

    def calibrate(files: ModelFiles, text: str) -> Importance:
        lengths.append(chunk_tokens(files))
        return {"blk.0.attn_q.weight": np.ones(256, np.float32)}

    isq = IsqOptions(type="Q4K", calibration_file=str(text), cache=str(cache))
    source = ModelSource(model=str(tmp_path / "model"), isq=isq)
    ways = [
        source,
        replace(source, tokenizer=str(tmp_path / "other")),
        replace(source, tokenizer=str(tmp_path / "other/tokenizer.json"), max_seq_len=64),
        replace(source, tokenizer=str(EMBEDDED_MODEL)),
        replace(source, max_seq_len=64),
    ]
    for way in [*ways, *ways]:
        load_model(resolve(way), dtype="auto", device="cpu", calibrate=calibrate)
    assert lengths == [512, 512, 64, 512, 64]
    assert len(kept(cache)) == len(ways)
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config | {"add_eos_token": True}))
    load_model(resolve(source), dtype="auto", device="cpu", calibrate=calibrate)
    assert len(kept(cache)) == len(ways) + 1


def test_a_source_of_the_same_size_and_time_is_looked_into(tmp_path: Path) -> None:
    source, cache = tmp_path / "m.gguf", tmp_path / "cache"
    shutil.copy2(GGUF, source)
    load(source, type="Q4K", cache=str(cache))
    times = source.stat()
    data = bytearray(source.read_bytes())
    weights = np.frombuffer(data, np.float32, 1 << 20, len(data) - (4 << 20))
    weights *= np.float32(0.5)
    source.write_bytes(data)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = load(source, type="Q4K", cache=str(cache))
    assert len(kept(cache)) == 2
    assert same(changed.model, load(source, type="Q4K").model)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "of another plan"])
def test_a_damaged_result_is_made_anew(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(GGUF, type="Q4K", cache=str(tmp_path))
    [name] = kept(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    if damage == "of another plan":
        load(GGUF, type="Q8_0", cache=str(tmp_path / "b"))
        shutil.copy(next((tmp_path / "b").iterdir()), path)
        shutil.rmtree(tmp_path / "b")
    else:
        path.write_bytes(whole[:-1000] if damage == "truncated" else b"no tensors at all")
    found = load(GGUF, type="Q4K", cache=str(tmp_path))
    assert "is damaged and made anew" in caplog.text
    assert path.read_bytes() == whole
    assert same(found.model, load(GGUF, type="Q4K").model)


def test_without_room_nothing_is_kept_and_the_model_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    found = load(GGUF, type="Q4K", cache=str(tmp_path / "file"))
    assert "nothing is kept for the next start" in caplog.text
    assert same(found.model, load(GGUF, type="Q4K").model)


def test_a_full_disk_leaves_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serve_app.loaders.isq_cache.os.fsync", full)
    found = load(GGUF, type="Q4K", cache=str(tmp_path))
    assert "No space left on device" in caplog.text
    assert kept(tmp_path) == []
    assert same(found.model, load(GGUF, type="Q4K").model)


def test_weights_that_cannot_be_kept_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("row 3 has a value that is not finite")

    monkeypatch.setattr("serve_app.loaders.recode.requantize", fails)
    with pytest.raises(ModelFileError, match="row 3"):
        load(GGUF, type="Q4K", cache=str(tmp_path))
    assert kept(tmp_path) == []


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead, living = (tmp_path / f"{name}.safetensors.part" for name in ("dead", "living"))
    dead.write_text("half")
    with living.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        load(GGUF, type="Q4K", cache=str(tmp_path))
        assert not dead.exists()
        assert living.exists()
        assert len(kept(tmp_path)) == 2


def start(model: Path, cache: Path) -> subprocess.Popen[str]:
    """A process that quantises the model when it is told to."""
    first = {"model": str(EMBEDDED_MODEL), "type": "Q5_K"}
    works = [json.dumps(work) for work in (first, {"model": str(model), "type": "Q5_K", "cache": str(cache)})]
    command = [sys.executable, str(Path(__file__).with_name("isq_probe.py")), "load", *works]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def say(process: subprocess.Popen[str], expected: str) -> None:
    """Waits for a word of the process, and answers it."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == expected + "\n"
    process.stdin.write("\n")
    process.stdin.flush()


class Waits:
    """A LoadProgress that does not let its load begin before another one waits for it."""

    def __init__(self, log: pytest.LogCaptureFixture) -> None:
        self._log = log
        self.begun = threading.Event()

    def start(self, title: str, total_bytes: int) -> None:
        self.begun.set()
        deadline = time.monotonic() + 30
        while "another process writes it, waiting" not in self._log.text:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def advance(self, tensor: str, num_bytes: int) -> None:
        """Goes by itself."""

    def finish(self) -> None:
        """Nothing is shown."""


def test_of_two_at_once_the_second_waits_and_maps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    files = resolve(ModelSource(model=str(GGUF), isq=IsqOptions(type="Q5_K", cache=str(tmp_path))))
    waits = Waits(caplog)

    def is_cached(listener: Waits | None) -> bool:
        report = prepare(files, open_checkpoint(files), listener).report("", 0.0)
        assert report is not None
        return report.is_cached

    with ThreadPoolExecutor() as pool:
        first = pool.submit(is_cached, waits)
        assert waits.begun.wait(30)
        second = pool.submit(is_cached, None)
        assert [first.result(), second.result()] == [False, True]
    [name] = kept(tmp_path)
    assert name.endswith(".safetensors")


@pytest.mark.nightly
def test_killed_in_the_middle_and_two_at_once(tmp_path: Path, big_folder: Path) -> None:
    cache = tmp_path / "cache"
    with start(big_folder, cache) as killed, start(big_folder, cache) as first, start(big_folder, cache) as second:
        say(killed, "ready")
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > 1 << 20 for path in cache.glob("*.part")):
            assert time.monotonic() < deadline
            assert killed.poll() is None
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        [left] = kept(cache)
        assert left.endswith(".safetensors.part")
        for process in (first, second):
            say(process, "ready")
        for process in (first, second):
            say(process, "loaded")
        assert [process.wait(30) for process in (first, second)] == [0, 0]
    assert kept(cache) == [left.removesuffix(".part")]
    assert same(load(big_folder, type="Q5_K", cache=str(cache)).model, load(big_folder, type="Q5_K").model)
