import pytest

from kernels.formats import BY_NAME
from serve_app.quant.quant_type import QuantType


def test_members_are_the_decodable_formats() -> None:
    assert {t.value for t in QuantType} == {name for name, form in BY_NAME.items() if form.is_decodable}
    assert all(t.form.name == t.value for t in QuantType)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Q4K", "Q4_K"), ("q4_k", "Q4_K"), ("q8-0", "Q8_0"), ("Iq2Xxs", "IQ2_XXS"), ("bf16", "BF16"), ("TQ1_0", "TQ1_0")],
)
def test_usual_spellings(text: str, expected: str) -> None:
    assert QuantType.parse(text) is QuantType(expected)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown quantisation type 'Q9_K'.*Q4_K"):
        QuantType.parse("Q9_K")
