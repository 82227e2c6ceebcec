from typing import Any

import pytest

from serve_app.errors import ModelFileError
from serve_app.loaders.generation_config import sampling_defaults, token_ids
from serve_app.options import SamplingParams


def test_the_models_defaults_replace_openais() -> None:
    config = {
        "temperature": 0.6,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "do_sample": True,
    }
    expected = SamplingParams(temperature=0.6, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.1)
    assert sampling_defaults(config, "f") == expected
    assert sampling_defaults({}, "f") == SamplingParams()
    assert sampling_defaults({"temperature": None, "unknown": []}, "f") == SamplingParams()


def test_do_sample_false_is_greedy_and_absent_is_not() -> None:
    assert sampling_defaults({"do_sample": False, "temperature": 0.7}, "f").temperature == 0.0
    assert sampling_defaults({"temperature": 0.7}, "f").temperature == 0.7


def test_other_spellings() -> None:
    assert sampling_defaults({"top_k": -1}, "f").top_k == 0
    assert sampling_defaults({"max_new_tokens": 128}, "f").max_tokens == 128


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_k", 1.5),
        ("top_k", -2),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
    ],
)
def test_a_bad_value_is_named(key: str, value: Any) -> None:
    with pytest.raises(ModelFileError, match=f"^gen.json: key '{key}' is"):
        sampling_defaults({key: value}, "gen.json")


def test_token_ids() -> None:
    assert token_ids(None, "f", "k") == ()
    assert token_ids(2, "f", "k") == (2,)
    assert token_ids([1, 2], "f", "k") == (1, 2)
    for bad in ("2", [1, "2"], -1, True, 2**31, {}):
        with pytest.raises(ModelFileError, match=r"^f: key 'k' is no token id$"):
            token_ids(bad, "f", "k")
