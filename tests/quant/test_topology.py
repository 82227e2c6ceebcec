"""Topology files: which rule counts for a layer, and what a mistake in one is told."""

from pathlib import Path

import pytest

from serve_app.errors import ModelFileError
from serve_app.quant.mix import ModelFacts, Recipe
from serve_app.quant.quant_type import QuantType
from serve_app.quant.topology import Topology, read_topology

FACTS = ModelFacts("llama", n_layers=8, n_heads=4, n_kv_heads=4)
SHAPE = (256, 256)


def topology(tmp_path: Path, text: str) -> Topology:
    path = tmp_path / "t.yml"
    path.write_text(text)
    return read_topology(path)


def types(found: Topology, layers: range) -> list[str | None]:
    return [found.type_of(layer, [f"blk.{layer}.attn_q.weight"]) for layer in layers]


def test_the_last_layer_of_a_range_does_not_count(tmp_path: Path) -> None:
    found = topology(tmp_path, "0-2:\n  isq: Q3K\n3:\n  isq: 8\n")
    assert types(found, range(5)) == ["Q3_K", "Q3_K", None, "Q8_0", None]
    assert found.types == (QuantType.Q3_K, QuantType.Q8_0)
    assert found.type_of(None, ["token_embd.weight"]) is None


def test_the_range_that_ends_last_wins_and_then_the_later_one(tmp_path: Path) -> None:
    found = topology(tmp_path, "0-8:\n  isq: Q4K\n2-4:\n  isq: Q8_0\n4-8:\n  isq: hqq4\n")
    assert types(found, range(8)) == ["Q4_K"] * 4 + ["HQQ4"] * 4


def test_patterns_come_before_ranges_and_the_last_one_wins(tmp_path: Path) -> None:
    text = "'/attn_q/':\n  isq: Q6K\n0-8:\n  isq: Q4K\n'/self_attn\\.q_proj\\.weight$/':\n  isq: Q8_0\n"
    found = topology(tmp_path, text)
    assert found.type_of(0, ["blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"]) == "Q8_0"
    assert found.type_of(0, ["blk.0.attn_q.weight", "blk.0.attn_q.weight"]) == "Q6_K"
    assert found.type_of(0, ["blk.0.attn_k.weight"]) == "Q4_K"


def test_recipe_and_topology_together(tmp_path: Path) -> None:
    found = topology(tmp_path, "1:\n  isq: Q8_0\n2:\n")
    recipe = Recipe.parse("Q4K", topology=found)
    wanted = [recipe.type_of(f"blk.{i}.ffn_up.weight", SHAPE, FACTS) for i in range(3)]
    assert [pair and pair[1] for pair in wanted] == ["Q4_K", "Q8_0", "Q4_K"]
    assert recipe.type_of("token_embd.weight", SHAPE, FACTS) == ("Q6_K", "Q6_K")
    alone = Recipe.parse(None, topology=found)
    assert alone.type_of("blk.1.ffn_up.weight", (256, 96), FACTS) == ("Q8_0", "Q8_0")
    assert alone.type_of("blk.0.ffn_up.weight", SHAPE, FACTS) is None
    assert alone.type_of("blk.1.attn_norm.weight", (256,), FACTS) is None
    assert alone.types == (QuantType.Q8_0,)


def test_devices_are_named_as_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = topology(tmp_path, "0-4:\n  isq: Q4K\n  device: cuda[0]\n")
    assert "devices are not followed" in caplog.text
    assert types(found, range(1)) == ["Q4_K"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mapping from layers"),
        ("- a", "a mapping from layers"),
        ("a: [", "is no valid YAML"),
        ("0-4: Q4K", "key '0-4' has other entries than isq and device"),
        ("0-4: {isq: Q4K, bits: 3}", "key '0-4' has other entries"),
        ("first: {isq: Q4K}", "key 'first' is neither a layer"),
        ("true: {isq: Q4K}", "key True is neither a layer"),
        ("4-4: {isq: Q4K}", "key '4-4' names no layer"),
        ("'/[/': {isq: Q4K}", "is no regular expression"),
        ("3: {isq: Q9K}", "key 3: isq: unknown quantisation type 'Q9K'"),
        ("3: {isq: IQ4_XS}", "can be read but not written"),
        ("3: {isq: Q4_K_M}", "Q4_K_M is a mix of types, a layer has one"),
        ("3: {device: cpu}", "nothing would be quantised"),
    ],
)
def test_mistakes_name_the_file_and_the_key(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        topology(tmp_path, text)
    assert str(tmp_path / "t.yml") in str(caught.value)
    assert message in str(caught.value)


def test_layers_that_the_model_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="key '0-9' names layers that a model of 8 does not have"):
        topology(tmp_path, "0-9: {isq: Q4K}").require_layers(8)
    topology(tmp_path, "0-8: {isq: Q4K}").require_layers(8)
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_topology(tmp_path / "missing.yml")
