"""Which tensor gets which type. That mixes choose as llama-quantize does is seen in tests/loaders/test_quantized.py."""

import pytest

from serve_app.quant.fallback import fitting_type
from serve_app.quant.mix import ModelFacts, Recipe, is_quantisable
from serve_app.quant.quant_type import QuantType

FACTS = ModelFacts("llama", n_layers=16, n_heads=32, n_kv_heads=8, is_tied=True)


def chosen(recipe: str, name: str, facts: ModelFacts = FACTS, columns: int = 2048) -> str:
    found = Recipe.parse(recipe).type_of(name, (64, columns), facts)
    assert found is not None
    return str(found[1])


@pytest.mark.parametrize(
    ("wanted", "fitting"),
    [("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"), ("Q8_0", "Q8_0")],
)
def test_rows_that_are_no_whole_super_blocks_fall_back(wanted: str, fitting: str) -> None:
    assert fitting_type(QuantType(wanted), 96) == fitting
    assert fitting_type(QuantType(wanted), 172) == "F16"
    assert fitting_type(QuantType(wanted), 512) == wanted


def test_embedding_and_head_get_a_better_type() -> None:
    assert chosen("Q4K", "token_embd.weight") == "Q6_K"
    assert chosen("Q6K", "token_embd.weight") == "Q8_0"
    assert chosen("HQQ4", "output.weight") == "HQQ8"
    assert chosen("Q8_0", "output.weight") == "Q8_0"
    pure = Recipe.parse("Q4K", promotes=False).type_of("token_embd.weight", (64, 2048), FACTS)
    assert pure == (QuantType.Q4_K, QuantType.Q4_K)


def test_norms_and_routers_stay() -> None:
    for name in ("blk.0.attn_norm.weight", "blk.1.ffn_gate_inp.weight", "blk.0.attn_q.bias", "rope_freqs.weight"):
        assert not is_quantisable(name, (8, 8))
    assert not is_quantisable("output.weight", (8,))


def test_mixes_know_layers_experts_and_shared_values() -> None:
    assert [chosen("Q4_K_M", f"blk.{i}.ffn_down.weight") for i in (0, 2, 3, 4, 5, 14)] == [
        "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q6_K",
    ]  # fmt: skip
    assert chosen("q2k", "blk.3.attn_v.weight") == "Q4_K"
    experts = ModelFacts("llama", 32, 32, 8, n_experts=8)
    assert chosen("Q4_K_M", "blk.3.attn_k.weight", experts) == "Q8_0"
    assert chosen("Q4_K_M", "blk.3.attn_output.weight", experts) == "Q5_K"
    assert chosen("Q3_K_M", "blk.9.attn_v.weight", ModelFacts("llama", 80, 64, 8)) == "Q5_K"


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"unknown quantisation type 'Q4_K_XL'.*Q4_K_M"):
        Recipe.parse("Q4_K_XL")
