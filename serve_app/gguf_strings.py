"""Arrays of strings in a GGUF header, which hold a vocabulary and its merges: some 10^5 strings in some 10 ms.

An array is a chain, each string's length (8 bytes, little-endian) saying where the next one begins, and a Python loop
along it takes as long as reading the weights. Here whole stretches of it are followed at once: all places that look
like the length of a short string are found in parallel, and a stretch holds as long as each place leads to the next.
Places that only look like one are never reached, so the result is that of the plain loop for any bytes.
"""

from struct import Struct
from typing import Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

_LENGTH: Final = Struct("<Q")
_LENGTH_BYTES: Final = 8
_WINDOW_BYTES: Final = 1 << 16
# Tokens and merges are mostly shorter, so one or two windows cover an array.
_BYTES_A_STRING: Final = 24
# Following fewer strings at once takes longer than one by one.
_WORTHWHILE: Final = 16
_SEPARATOR: Final = "\0" * _LENGTH_BYTES


def read_strings(data: Bytes, start: int, count: int) -> tuple[list[str], int]:
    """`count` strings from data[start:], and where they end.

    Takes time and memory in proportion to their bytes. Raises EOFError where data ends inside of one,
    UnicodeDecodeError where one is not UTF-8.
    """
    if not count:
        return [], start
    begins, end = _find(data, start, count)
    return _decoded(data[start:end].copy(), begins - start), end


def skip_strings(data: Bytes, start: int, count: int) -> int:
    """Where `count` strings from data[start:] end; EOFError as read_strings."""
    return _find(data, start, count)[1] if count else start


def _find(data: Bytes, start: int, count: int) -> tuple[Places, int]:
    """Where the length of each string lies, and the end of the last string."""
    stretches: list[Places] = []
    pos, left = start, count
    while left:
        if len(data) - pos < _LENGTH_BYTES:
            raise EOFError
        window = data[pos : pos + max(_WINDOW_BYTES, _BYTES_A_STRING * left)]
        found, used = _follow(window, left)
        stretches.append(found + pos)
        pos += used
        left -= len(found)
    if pos > len(data):
        raise EOFError
    return np.concatenate(stretches), pos


def _follow(window: Bytes, count: int) -> tuple[Places, int]:
    """The same for the strings whose lengths lie in window, at most count and at least one; relative to its start."""
    places, nexts, last_of_stretch = _short_lengths(window)
    stretches: list[Places] = []
    pos, left, num_plain = 0, count, 1
    while left and pos + _LENGTH_BYTES <= len(window):
        first = int(np.searchsorted(places, pos))
        last = -1
        if first < len(places) and places[first] == pos:
            last = min(int(last_of_stretch[np.searchsorted(last_of_stretch, first)]), first + left - 1)
        if last - first >= _WORTHWHILE:
            stretch = places[first : last + 1]
            pos = int(nexts[last])
            num_plain = 1
        else:
            # A long or empty string. Where many of them follow each other this is a plain loop.
            stretch, pos = _walk(window, pos, min(left, num_plain))
            num_plain *= 2
        stretches.append(stretch)
        left -= len(stretch)
    return np.concatenate(stretches), pos


def _walk(window: Bytes, pos: int, count: int) -> tuple[Places, int]:
    """One after the other, as long as their lengths lie in window."""
    places: list[int] = []
    view, last = window.data, len(window) - _LENGTH_BYTES
    while count and pos <= last:
        places.append(pos)
        (length,) = _LENGTH.unpack_from(view, pos)
        pos += _LENGTH_BYTES + length
        count -= 1
    return np.array(places, np.int64), pos


def _short_lengths(window: Bytes) -> tuple[Places, Places, Places]:
    """Places where eight bytes are a number below 256; where a string that began there would end; and the indices of
    places that do not lead to the next one."""
    zero = window == 0
    two = zero[:-1] & zero[1:]
    four = two[:-2] & two[2:]
    seven = four[:-3] & four[3:]
    places = np.flatnonzero(seven[1:]).astype(np.int64)
    nexts = places + _LENGTH_BYTES + window[places]
    last_of_stretch = np.flatnonzero(nexts[:-1] != places[1:])
    return places, nexts, np.append(last_of_stretch, len(places) - 1)


def _decoded(region: Bytes, begins: Places) -> list[str]:
    """The strings of a region that holds nothing else; their lengths, at `begins`, are written over."""
    ends = np.append(begins[1:], len(region))
    for i in range(_LENGTH_BYTES):
        region[begins + i] = 0
    raw = region.tobytes()
    if raw.count(0) == _LENGTH_BYTES * len(begins):
        texts = raw.decode().split(_SEPARATOR)
        del texts[0]
        return texts
    spans = zip((begins + _LENGTH_BYTES).tolist(), ends.tolist(), strict=True)
    return [raw[begin:end].decode() for begin, end in spans]
