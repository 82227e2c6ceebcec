"""The published mixtures' configurations: what is built asks for exactly their tensors, nothing more and nothing less.

Hyper-parameters, tensor names and numbers of parameters are those of the checkpoints' pages on the Hugging Face hub.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import pytest
from asked_source import Asked

from serve_app.models.registry import find_family

Shapes = dict[str, tuple[int, ...]]

MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# The 64 published divisors of each set are of no consequence for names and shapes: ones stand for them.
PHI: dict[str, Any] = {
    "architectures": ["PhiMoEForCausalLM"],
    "attention_bias": True,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "lm_head_bias": True,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0] * 64,
        "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 64,
        "short_mscale": 1.243163121016122,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}


def attention(hidden: int, queries: int, keys: int, biased: str = "") -> Shapes:
    sizes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    shapes: Shapes = {f"self_attn.{x}_proj.weight": size for x, size in sizes.items()}
    return shapes | {f"self_attn.{x}_proj.bias": sizes[x][:1] for x in biased}


def gated(prefix: str, names: Sequence[str], hidden: int, inner: int) -> Shapes:
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    return {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}


def experts(prefix: str, names: Sequence[str], count: int, hidden: int, inner: int) -> Shapes:
    shapes: Shapes = {f"{prefix}.gate.weight": (count, hidden)}
    for number in range(count):
        shapes |= gated(f"{prefix}.experts.{number}", names, hidden, inner)
    return shapes


def whole(layers: int, layer: Shapes, vocab: int, hidden: int, norms: Sequence[str] = ("weight",)) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    for kind in norms:
        shapes[f"model.norm.{kind}"] = (hidden,)
        layer |= {f"{x}_layernorm.{kind}": (hidden,) for x in ("input", "post_attention")}
    return shapes | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


W, P = ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")
HEAD_NORMS: Shapes = {"self_attn.q_norm.weight": (128,), "self_attn.k_norm.weight": (128,)}
SHARED_GATE: Shapes = {"mlp.shared_expert_gate.weight": (1, 2048)}
CASES: dict[str, tuple[dict[str, Any], Shapes, int]] = {
    "Mixtral-8x7B-v0.1": (
        MIXTRAL,
        whole(32, attention(4096, 4096, 1024) | experts("block_sparse_moe", W, 8, 4096, 14336), 32000, 4096),
        46_702_792_704,
    ),
    "Qwen3-30B-A3B": (
        QWEN3,
        whole(48, attention(2048, 4096, 512) | HEAD_NORMS | experts("mlp", P, 128, 2048, 768), 151936, 2048),
        30_532_122_624,
    ),
    "Qwen1.5-MoE-A2.7B": (
        QWEN2,
        whole(
            24,
            attention(2048, 2048, 2048, "qkv")
            | experts("mlp", P, 60, 2048, 1408)
            | gated("mlp.shared_expert", P, 2048, 5632)
            | SHARED_GATE,
            151936,
            2048,
        ),
        14_315_784_192,
    ),
    "Phi-3.5-MoE-instruct": (
        PHI,
        whole(
            32,
            attention(4096, 4096, 1024, "qkvo") | experts("block_sparse_moe", W, 16, 4096, 6400),
            32064,
            4096,
            ("weight", "bias"),
        )
        | {"lm_head.bias": (32064,)},
        41_873_153_344,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_published_model_asks_for_its_tensors(name: str) -> None:
    config, published, num_parameters = CASES[name]
    assert sum(prod(shape) for shape in published.values()) == num_parameters
    family = find_family(config["architectures"][0], name)
    asked = Asked(published)
    family.build(family.args.from_hf(config), asked)
    assert asked.shapes == published
