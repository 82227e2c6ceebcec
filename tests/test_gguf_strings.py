import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gguf_strings import read_strings


def stored(texts: list[str]) -> bytes:
    raws = [text.encode() for text in texts]
    return b"".join(struct.pack("<Q", len(raw)) + raw for raw in raws)


def read(raw: bytes, count: int, start: int = 0) -> tuple[list[str], int]:
    return read_strings(np.frombuffer(raw, np.uint8), start, count)


# Lengths on both sides of 256, empty strings, and bytes that look like lengths.
TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["", "\0" * 7, "\5" + "\0" * 7, "é" * 127, "é" * 128, "a" * 255, "a" * 70000])
)


@given(st.lists(TEXTS, max_size=40), st.binary(max_size=9), st.binary(max_size=9))
def test_reads_what_was_written(texts: list[str], before: bytes, after: bytes) -> None:
    raw = stored(texts)
    assert read(before + raw + after, len(texts), len(before)) == (texts, len(before) + len(raw))


@pytest.mark.parametrize("texts", [[f"token {i}" for i in range(20000)], ["", "\0"] * 3000, ["x" * 300, "y"] * 900])
def test_long_arrays(texts: list[str]) -> None:
    raw = stored(texts)
    assert read(raw, len(texts)) == (texts, len(raw))


@given(st.lists(TEXTS, min_size=1, max_size=20), st.integers(1, 400))
def test_truncation(texts: list[str], missing: int) -> None:
    raw = stored(texts)
    with pytest.raises(EOFError):
        read(raw[: max(0, len(raw) - missing)], len(texts))


def test_a_length_beyond_everything() -> None:
    with pytest.raises(EOFError):
        read(struct.pack("<Q", 2**64 - 1) + b"abc", 1)


@pytest.mark.parametrize("texts", [[b"ok", b"\xe9", b"ok"], [b"\xc3", b"\xa9"], [b"\0", b"\xe9"]])
def test_what_is_no_utf8(texts: list[bytes]) -> None:
    with pytest.raises(UnicodeDecodeError):
        read(b"".join(struct.pack("<Q", len(raw)) + raw for raw in texts), len(texts))
