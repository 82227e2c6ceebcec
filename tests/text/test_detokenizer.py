import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.text.detokenizer import Detokenizer, DetokenizerTable
from serve_app.text.tokenizer import Tokenizer, open_tokenizer

DATA = Path(__file__).parents[1] / "data"
STORIES = DATA / "models/stories260K/hf"
# Without the character that SentencePiece writes for a space: it comes back as one.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=30)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_tokenizer(STORIES)


@pytest.fixture(scope="module")
def table(tokenizer: Tokenizer) -> DetokenizerTable:
    return DetokenizerTable(tokenizer)


def run(table: DetokenizerTable, ids: Sequence[int], stop: tuple[str, ...] = (), prompt: Sequence[int] = ()) -> str:
    detokenizer = Detokenizer(table, stop, prompt)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str] | None:
    """(text before it, stop) of the stop string that is complete first; the longest of those that end together."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stops if s and text[:end].endswith(s)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return None


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 511), max_size=30), prompt=st.lists(st.integers(0, 511), max_size=4))
def test_any_ids_stream_to_what_decode_gives(
    tokenizer: Tokenizer, table: DetokenizerTable, ids: list[int], prompt: list[int]
) -> None:
    before = tokenizer.decode(prompt)
    if not before.endswith("�"):
        assert before + run(table, ids, prompt=prompt) == tokenizer.decode(prompt + ids)


@given(text=TEXTS)
def test_no_piece_ever_breaks_a_character(tokenizer: Tokenizer, table: DetokenizerTable, text: str) -> None:
    detokenizer = Detokenizer(table, (), [])
    sent = ""
    for i in tokenizer.encode(text):
        sent += detokenizer.push(i)
        assert text.startswith(sent)
    assert sent + detokenizer.flush() == text


def test_a_completion_keeps_its_leading_space(tokenizer: Tokenizer, table: DetokenizerTable) -> None:
    once = tokenizer.encode("Once", add_special=False)
    assert run(table, once) == "Once"
    assert run(table, once, prompt=[1]) == "Once"
    assert run(table, once, prompt=tokenizer.encode("Hi")) == " Once"
    assert run(table, [1, *once]) == "Once"


def test_unfinished_characters(table: DetokenizerTable) -> None:
    euro = [3 + b for b in "€".encode()]
    assert run(table, euro) == "€"
    assert run(table, euro[:2]) == "�"
    assert run(table, [*euro[:2], 403]) == "� Once"
    assert run(table, [*euro[:2], *euro]) == "�€"
    assert run(table, euro[2:], prompt=euro[:2]) == "€"
    assert run(table, [403], prompt=euro) == " Once"
    detokenizer = Detokenizer(table, (), [])
    assert [detokenizer.push(i) for i in euro] == ["", "", "€"]
    assert detokenizer.flush() == ""


def test_ids_beyond_the_vocabulary_are_silent(table: DetokenizerTable) -> None:
    assert run(table, [403, 100_000, 403], prompt=[403, 100_000]) == " Once Once"
    assert run(table, [100_000], stop=("x",), prompt=[403]) == ""


ALPHABET = "ab c"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


@settings(max_examples=400)
@given(text=st.text(ALPHABET, max_size=24), stops=STOPS, cuts=st.lists(st.integers(1, 4), min_size=24, max_size=24))
@example(text="abcb", stops=("abca", "cb"), cuts=[1] * 24)
@example(text="aab", stops=("ab",), cuts=[2] * 24)
def test_stop_strings_across_token_borders(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(text[at : at + cut])
        at += cut
    expected, stop = first_stop(text, stops) or (text, None)
    detokenizer = Detokenizer(table_of(pieces), stops, [])
    sent, seen = "", ""
    for i, piece in enumerate(pieces):
        sent += detokenizer.push(i)
        seen += piece
        assert expected.startswith(sent)
        if detokenizer.stopped_by is None:
            held = max(n for n in range(len(seen) + 1) if any(s.startswith(seen[len(seen) - n :]) for s in stops))
            assert len(sent) == len(seen) - held
    assert (sent + detokenizer.flush(), detokenizer.stopped_by) == (expected, stop)
    if stop is not None:
        assert detokenizer.push(0) == detokenizer.flush() == ""


def table_of(pieces: Sequence[str]) -> DetokenizerTable:
    class Pieces:
        strips_space = False
        vocab_size = len(pieces)

        def token_bytes(self, token_id: int) -> bytes:
            return pieces[token_id].encode()

    return DetokenizerTable(Pieces())  # type: ignore[arg-type]


def test_held_text_comes_at_the_latest_with_flush() -> None:
    detokenizer = Detokenizer(table_of(["Hello", " <", "end", "> "]), ("<end>!",), [])
    assert [detokenizer.push(i) for i in range(3)] == ["Hello", " ", ""]
    assert detokenizer.flush() == "<end"
    detokenizer = Detokenizer(table_of(["Hello", " <", "end", "> "]), ("<end>!",), [])
    assert [detokenizer.push(i) for i in range(4)] == ["Hello", " ", "", "<end> "]


def test_stops_can_be_passed_before_min_tokens() -> None:
    detokenizer = Detokenizer(table_of(["a", "STO", "P", "b"]), ("STOP",), [])
    assert [detokenizer.push(i, may_stop=i > 2) for i in range(3)] == ["a", "STO", "P"]
    assert "".join(detokenizer.push(i) for i in (1, 2, 3)) == ""
    assert detokenizer.stopped_by == "STOP"


def test_empty_stop_strings_mean_nothing(table: DetokenizerTable) -> None:
    assert run(table, [403, 403], stop=("",)) == "Once Once"


def test_a_token_costs_little(tokenizer: Tokenizer, table: DetokenizerTable) -> None:
    """The engine's budget is 2 µs a token; benchmarks/detokenizer.py measures it properly."""
    ids = tokenizer.encode("Once upon a time, there was a little girl named Lily. " * 100)
    best = float("inf")
    for _ in range(5):
        detokenizer = Detokenizer(table, (), [1])
        start = time.thread_time()
        for i in ids:
            detokenizer.push(i)
        best = min(best, (time.thread_time() - start) / len(ids))
    assert best < 2e-6
