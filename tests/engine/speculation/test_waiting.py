"""Waiting for another process, asleep or looking."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from serve_app.engine.speculation.waiting import LOOK_S, Waiting


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture(params=[True, False], ids=["looks", "sleeps"])
def waiting(request: pytest.FixtureRequest) -> Waiting:
    return Waiting(spins=request.param)


@pytest.mark.parametrize("spin_s", [0.0, 0.005, 1.0])
def test_nothing_comes(waiting: Waiting, pipe: tuple[int, int], spin_s: float) -> None:
    waiting.add(pipe[0])
    began_s = time.monotonic()
    assert waiting.wait(0.02, spin_s) == []
    assert 0.02 <= time.monotonic() - began_s < 0.5
    assert waiting.wait(0.0, spin_s) == waiting.wait(-1.0, spin_s) == []


@pytest.mark.parametrize(("timeout_s", "spin_s"), [(None, 0.0), (None, 5.0), (5.0, 0.0), (5.0, 5.0), (5.0, 0.001)])
def test_what_comes_while_it_waits(
    waiting: Waiting, pipe: tuple[int, int], timeout_s: float | None, spin_s: float
) -> None:
    """Other threads of Python's work meanwhile: it is one of them that writes."""
    silent = os.pipe()

    def write() -> None:
        time.sleep(0.01)
        os.write(pipe[1], b"1")

    waiting.add(silent[0])
    waiting.add(pipe[0])
    writer = threading.Thread(target=write)
    writer.start()
    assert waiting.wait(timeout_s, spin_s) == [pipe[0]]
    writer.join()
    # It stays readable until somebody reads.
    assert waiting.wait(timeout_s, spin_s) == waiting.look() == [pipe[0]]
    waiting.remove(pipe[0])
    assert waiting.wait(0.0, spin_s) == []
    for end in silent:
        os.close(end)


def test_the_others_end_is_closed(waiting: Waiting) -> None:
    ours, theirs = os.pipe()
    waiting.add(ours)
    os.close(theirs)
    assert waiting.wait(None) == [ours]
    os.close(ours)


def test_looking_is_short(waiting: Waiting, pipe: tuple[int, int]) -> None:
    waiting.add(pipe[0])
    began_s = time.monotonic()
    assert waiting.look() == []
    assert (LOOK_S if waiting.spins else 0.0) <= time.monotonic() - began_s < 0.5


def test_without_native_code_nobody_looks_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import dispatch

    monkeypatch.setenv("SIROCCO_NATIVE", "0")
    dispatch.native.cache_clear()
    try:
        assert not Waiting(spins=True).spins
    finally:
        monkeypatch.undo()
        dispatch.native.cache_clear()
    assert Waiting(spins=True).spins
