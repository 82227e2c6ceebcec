"""Random small configurations of every dense family, for transformers and for us."""

from typing import Any

import torch
import transformers
from tiny_llama import SMALL as TINY
from tiny_llama import DictSource

from serve_app.models.base import CausalLM
from serve_app.models.registry import find_family

SMALL = TINY | {"max_position_embeddings": 512, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
MHA = {"num_key_value_heads": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 3.0, 6.0, 9.0, 12.0],
}
GEMMA = {"head_dim": 16, "tie_word_embeddings": True}
GEMMA3_LAYERS = {"num_hidden_layers": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20}
PHI2 = {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.5,
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "llama yarn, own magnitude": ("Llama", {"rope_parameters": YARN | {"attention_factor": 0.8, "beta_fast": 8.0}}),
    "llama": ("Llama", {}),
    "llama, linear": ("Llama", MHA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, short window": ("Mistral", {"sliding_window": 9}),
    "mistral, window of the prompt": ("Mistral", {"sliding_window": 70}),
    "mistral, every head its own, tied": ("Mistral", MHA | {"sliding_window": 20, "tie_word_embeddings": True}),
    "mistral, longrope": (
        "Mistral",
        {"rope_parameters": LONG | {"original_max_position_embeddings": 32, "factor": 16.0}},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("Qwen2", QWEN_WINDOW),
    "qwen2, every head its own, yarn": ("Qwen2", MHA | {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, tied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3, window, biases": ("Qwen3", QWEN_WINDOW | {"head_dim": 8, "attention_bias": True}),
    "qwen3, every head its own": ("Qwen3", MHA | {"head_dim": 20, "rope_parameters": YARN}),
    "gemma": ("Gemma", GEMMA),
    "gemma, one KV head": ("Gemma", GEMMA | {"num_key_value_heads": 1}),
    "gemma, every head its own": ("Gemma", GEMMA | MHA),
    "gemma, own head": ("Gemma", GEMMA | {"tie_word_embeddings": False, "head_dim": 12}),
    "gemma, biases": ("Gemma", GEMMA | {"attention_bias": True}),
    "gemma2, biases": ("Gemma2", GEMMA | {"attention_bias": True}),
    "gemma2": ("Gemma2", GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 30}),
    "gemma2, short window": ("Gemma2", GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma2, long window": ("Gemma2", GEMMA | {"sliding_window": 200, "query_pre_attn_scalar": 16}),
    "gemma2, tight caps": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2, no caps": ("Gemma2", GEMMA | MHA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", GEMMA | GEMMA3_LAYERS | {"sliding_window": 8}),
    "gemma3, long window": ("Gemma3", GEMMA | GEMMA3_LAYERS | {"sliding_window": 300}),
    "gemma3, one KV head": ("Gemma3", GEMMA | GEMMA3_LAYERS | {"num_key_value_heads": 1, "sliding_window": 15}),
    "gemma3, published pattern": (
        "Gemma3",
        GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 16, "sliding_window": 8},
    ),
    "gemma3, biases": ("Gemma3", GEMMA | GEMMA3_LAYERS | {"attention_bias": True}),
    "gemma3, scaled": (
        "Gemma3",
        GEMMA | GEMMA3_LAYERS | MHA | {
            "sliding_window": 12,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", {}),
    "phi3, window": ("Phi3", {"sliding_window": 10}),
    "phi3, every head its own": ("Phi3", MHA | {"sliding_window": 100}),
    "phi3, long": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "phi3, short": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 512}),
    "phi3, longer than trained": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256}),
    "phi2": ("Phi", PHI2),
    "phi2, most of a head": ("Phi", PHI2 | {"partial_rotary_factor": 0.67}),
    "phi2, grouped": ("Phi", PHI2 | {"num_key_value_heads": 2}),
    "phi2, deep": ("Phi", PHI2 | {"num_hidden_layers": 4, "layer_norm_eps": 1e-3}),
    "granite": ("Granite", GRANITE),
    "granite, tied": ("Granite", GRANITE | MHA | {"tie_word_embeddings": True}),
    "granite, biases": ("Granite", GRANITE | {"attention_bias": True, "mlp_bias": True}),
    "starcoder2": ("Starcoder2", {}),
    "starcoder2, window": ("Starcoder2", {"sliding_window": 10}),
    "starcoder2, no biases": ("Starcoder2", {"use_bias": False, "sliding_window": 100}),
    "starcoder2, own head": ("Starcoder2", MHA | {"tie_word_embeddings": False}),
}  # fmt: skip


def hf_model(name: str) -> Any:
    """The random transformers model of a case, float32, its logits spread like a trained one's."""
    kind, changes = CASES[name]
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    # A copy: transformers completes the rope's section in place.
    copied = {k: dict(v) if isinstance(v, dict) else v for k, v in (SMALL | changes).items()}
    config = config_class(**copied, initializer_range=0.2)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    is_shifted = kind.startswith("Gemma")
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("norm.weight"):
            parameter.uniform_(-0.5, 0.5) if is_shifted else parameter.uniform_(0.5, 1.5)
        elif parameter_name.endswith(".bias"):
            parameter.normal_(std=0.3)
    return model


def our_model(hf: Any, device: str = "cpu") -> CausalLM:
    """The same weights in our model."""
    family = find_family(type(hf).__name__, "config.json")
    tensors = {k: v.detach() for k, v in hf.state_dict().items()}
    return family.build(family.args.from_hf(hf.config.to_dict()), DictSource(tensors, device=device))
