"""The dense models that are published: built without data, each asks for its checkpoint's tensors and for no other.

Configurations, numbers of parameters and of tensors are facts of the models' pages on the Hugging Face hub
(https://huggingface.co/<repository>/blob/main/config.json, the page's size, the weights' index). Keys for training
and caches only are left out; so are the divisors of longrope, of no consequence here: ones stand for them.
transformers, on the meta device and over the same dictionary, says which tensors belong to them. The mixtures are in
test_published_mixtures.
"""

from math import prod
from typing import Any

import pytest
import torch
import transformers
from asked_source import Asked

from serve_app.models.registry import find_family

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "vocab_size": 128256,
}  # fmt: skip
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768,
}  # fmt: skip
PHI2: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"], "bos_token_id": 50256, "eos_token_id": 50256, "hidden_act": "gelu_new",
    "hidden_size": 2560, "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
    "model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4, "qk_layernorm": False, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "vocab_size": 51200,
}  # fmt: skip
PHI3_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 32000,
    "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "sliding_window": 262144, "tie_word_embeddings": False, "vocab_size": 32064,
}  # fmt: skip
PHI3_MEDIUM = PHI3_MINI | {
    "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 4096, "num_attention_heads": 40,
    "num_hidden_layers": 40, "num_key_value_heads": 10, "rope_scaling": None, "sliding_window": 2047,
}  # fmt: skip
GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
    "bos_token_id": 2, "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
GEMMA2_9B = GEMMA2 | {
    "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_hidden_layers": 42,
    "num_key_value_heads": 8,
}  # fmt: skip
GEMMA2_27B = GEMMA2 | {
    "head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32,
    "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144,
}  # fmt: skip
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
    "bos_token_id": 2, "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
    "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
    "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN25_7B = QWEN25 | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "sliding_window": 131072,
    "tie_word_embeddings": False, "vocab_size": 152064,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
STARCODER2: dict[str, Any] = {
    "architectures": ["Starcoder2ForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
    "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "intermediate_size": 12288,
    "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05,
    "norm_type": "layer_norm", "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2,
    "rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": True, "vocab_size": 49152,
}  # fmt: skip

# Repository: its configuration, its parameters, its tensors (a tied head counted once).
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "meta-llama/Llama-3.1-8B": (LLAMA, 8_030_261_248, 291),
    "mistralai/Mistral-7B-v0.3": (MISTRAL, 7_248_023_552, 291),
    "microsoft/phi-2": (PHI2, 2_779_683_840, 453),
    "microsoft/Phi-3-mini-128k-instruct": (PHI3_MINI, 3_821_079_552, 195),
    "microsoft/Phi-3-medium-4k-instruct": (PHI3_MEDIUM, 13_960_238_080, 243),
    "google/gemma-2-2b": (GEMMA2, 2_614_341_888, 288),
    "google/gemma-2-9b": (GEMMA2_9B, 9_241_705_984, 464),
    "google/gemma-2-27b": (GEMMA2_27B, 27_227_128_320, 508),
    "google/gemma-3-1b-it": (GEMMA3, 999_885_952, 340),
    "Qwen/Qwen2.5-0.5B": (QWEN25, 494_032_768, 290),
    "Qwen/Qwen2.5-7B": (QWEN25_7B, 7_615_616_512, 339),
    "Qwen/Qwen3-0.6B": (QWEN3, 596_049_920, 310),
    "bigcode/starcoder2-3b": (STARCODER2, 3_030_371_328, 483),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_asks_for_the_published_tensors(name: str) -> None:
    config, num_parameters, num_tensors = PUBLISHED[name]
    architecture = config["architectures"][0]
    model_class = getattr(transformers, architecture)
    with torch.device("meta"):
        hf = model_class(model_class.config_class.from_dict(dict(config)))
    published = {key: tuple(value.shape) for key, value in hf.state_dict().items()}
    if hf.config.tie_word_embeddings:
        del published["lm_head.weight"]
    assert (sum(map(prod, published.values())), len(published)) == (num_parameters, num_tensors)
    family = find_family(architecture, "config.json")
    source = Asked(published)
    args = family.args.from_hf(dict(config))
    family.build(args, source)
    assert source.shapes == published
    assert args.max_position_embeddings == config["max_position_embeddings"]
