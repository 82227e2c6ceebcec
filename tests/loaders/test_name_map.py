import pytest
import torch

from serve_app.loaders.name_map import gguf_name, half_split_order, rotary_heads


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.12.self_attn.k_proj.bias", "blk.12.attn_k.bias"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        ("rope_freqs.weight", "rope_freqs.weight"),
        ("model.layers.3.unheard_of.weight", "model.layers.3.unheard_of.weight"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert gguf_name(name) == expected


def test_names_of_norms_on_both_sides() -> None:
    stem = "model.layers.3."
    assert gguf_name(f"{stem}post_attention_layernorm.weight", "gemma2") == "blk.3.post_attention_norm.weight"
    assert gguf_name(f"{stem}pre_feedforward_layernorm.weight", "gemma3") == "blk.3.ffn_norm.weight"
    assert gguf_name(f"{stem}post_attention_layernorm.weight", "gemma") == "blk.3.ffn_norm.weight"


def test_only_llamas_queries_and_keys_are_reordered() -> None:
    assert rotary_heads("llama", "model.layers.0.self_attn.q_proj.weight", 8, 2) == 8
    assert rotary_heads("llama", "model.layers.0.self_attn.k_proj.bias", 8, 2) == 2
    assert rotary_heads("llama", "model.layers.0.self_attn.v_proj.weight", 8, 2) is None
    assert rotary_heads("qwen2", "model.layers.0.self_attn.q_proj.weight", 8, 2) is None


def test_order_of_rows() -> None:
    assert half_split_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    # Where converters put the rows of Hugging Face's checkpoint: (head, half, i) → (head, i, half).
    original = torch.arange(3 * 10).view(3, 2, 5)
    stored = original.transpose(1, 2).reshape(-1)
    assert stored[half_split_order(30, 3)].tolist() == original.flatten().tolist()


@pytest.mark.parametrize(("rows", "heads"), [(10, 4), (6, 2), (8, 0)])
def test_rows_that_are_no_heads(rows: int, heads: int) -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        half_split_order(rows, heads)
