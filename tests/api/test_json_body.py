import pytest

from serve_app.api.json_body import parse_object
from serve_app.errors import InvalidRequest


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": -1e999}', "too large"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"x": [{"a": 1, "a": 2}]}', "twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"x": [["\\uDBFFx"]]}', "surrogate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "deeper"),
        (b'{"a": ' + b"[" * 100_000, "deeper"),
        (b'{"a": ' * 100_000, "deeper"),
    ],
)
def test_what_is_refused(body, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        parse_object(body, 64)


def test_what_is_taken():
    assert parse_object(b'{"a": "\\ud83e\\udd8a", "b": 1e300}', 64) == {"a": "🦊", "b": 1e300}
    nested = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"
    assert list(parse_object(nested, 64)) == ["a"]
    assert parse_object('{"é": "\u2028"}'.encode(), 64) == {"é": "\u2028"}
