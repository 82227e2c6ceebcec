import math

from serve_app.api.logprobs import LegacyLogprobs, chat_logprobs, joined
from serve_app.messages import TokenLogprob

HALVES = [
    TokenLogprob(1, -1.0, [(1, -1.0), (9, -math.inf)], r"bytes:\xf0\x9f", [r"bytes:\xf0\x9f", "x"]),
    TokenLogprob(2, -2.0, [], r"bytes:\xa6\x8a", []),
    TokenLogprob(3, -3.0, [], "!", []),
]


def test_chat_shows_the_true_bytes_of_half_a_character():
    content = chat_logprobs(HALVES)["content"]
    assert [entry["bytes"] for entry in content] == [[0xF0, 0x9F], [0xA6, 0x8A], [33]]
    assert bytes(content[0]["bytes"] + content[1]["bytes"]).decode() == "🦊"
    assert content[0]["token"] == r"bytes:\xf0\x9f"


def test_infinity_is_written_as_a_number():
    assert chat_logprobs(HALVES)["content"][0]["top_logprobs"][1]["logprob"] == -9999.0
    assert chat_logprobs([TokenLogprob(1, math.nan, [], "x")])["content"][0]["logprob"] == -9999.0


def test_legacy_offsets_count_characters_not_tokens():
    builder = LegacyLogprobs(1)
    builder.echo([], "ab")
    whole = joined([builder.take(HALVES[:1]), builder.take(HALVES[1:])])
    assert whole["text_offset"] == [2, 2, 3]
    assert whole["tokens"] == ["bytes:\\xf0\\x9f", "bytes:\\xa6\\x8a", "!"]
    assert whole["token_logprobs"] == [-1.0, -2.0, -3.0]


def test_legacy_top_holds_the_chosen_token_beyond_k():
    token = TokenLogprob(7, -5.0, [(1, -0.1), (2, -0.2)], "seven", ["one", "two"])
    assert LegacyLogprobs(1).take([token])["top_logprobs"] == [{"one": -0.1, "seven": -5.0}]
    assert LegacyLogprobs(0).take([token])["top_logprobs"] == [{"seven": -5.0}]


def test_an_echoed_prompt_keeps_its_offsets_without_control_tokens_and_first_space():
    texts = ["<s>", " Once", " ", r"bytes:\xf0\x9f", r"bytes:\xa6\x8a", " upon", "</s>"]
    builder = LegacyLogprobs(0)
    shown = builder.echo([TokenLogprob(1, -1.0, [], text) for text in texts], "Once 🦊 upon")
    assert shown["text_offset"] == [0, 0, 4, 5, 5, 6, 11]
    assert builder.take([TokenLogprob(1, -1.0, [], " a")])["text_offset"] == [11]
