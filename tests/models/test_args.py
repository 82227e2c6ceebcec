"""Reading configurations: every form is understood, every misfit names file and key."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_llama import DictSource, hf_llama, our_llama

from serve_app.errors import ModelFileError
from serve_app.layers.rope_scaling import RopeScaling
from serve_app.models.base import ModelArgs
from serve_app.models.llama import LlamaArgs, LlamaForCausalLM
from serve_app.models.registry import find_family

HF = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.context_length": 512,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.tokens": ["a"] * 100,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


def test_hf_defaults() -> None:
    args: ModelArgs = LlamaArgs.from_hf(HF)
    assert args == LlamaArgs.from_hf(HF | {"num_key_value_heads": 4, "head_dim": 16, "rope_scaling": None})
    assert (args.n_kv_heads, args.head_dim, args.max_position_embeddings) == (4, 16, 512)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
    ],
)
def test_every_form_of_llama3_scaling(rope: dict[str, Any]) -> None:
    args = LlamaArgs.from_hf(HF | rope)
    assert args.rope.theta == 5e5
    assert args.rope.scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 128)


def test_gguf() -> None:
    args: ModelArgs = LlamaArgs.from_gguf(GGUF)
    assert (args.n_layers, args.n_heads, args.n_kv_heads, args.head_dim) == (2, 4, 2, 16)
    assert (args.vocab_size, args.hidden_size, args.max_position_embeddings) == (100, 64, 512)


def test_gguf_counts_per_layer_and_linear_scaling() -> None:
    per_layer = GGUF | {"llama.attention.head_count_kv": np.array([2, 2], np.int32), "llama.vocab_size": 99}
    args = LlamaArgs.from_gguf(per_layer | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert (args.n_kv_heads, args.vocab_size, args.rope.scaling) == (2, 99, RopeScaling("linear", 4.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 1 << 40),
        ("num_attention_heads", "4"),
        ("num_attention_heads", True),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("vocab_size", -1),
        ("rms_norm_eps", float("nan")),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", "yes"),
        ("rope_theta", -1.0),
        ("rope_scaling", {"rope_type": "ntk", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
        ("rope_scaling", "linear"),
    ],
)
def test_hf_misfits_name_file_and_key(key: str, value: Any) -> None:
    with pytest.raises(ModelFileError, match=r"model/config\.json") as raised:
        LlamaArgs.from_hf(HF | {key: value}, "model/config.json")
    named = {"rope_scaling": ("rope_type", "low_freq_factor", "rope_scaling")}.get(key, (key,))
    assert any(name in str(raised.value) for name in named)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", None),
        ("llama.embedding_length", 1 << 30),
        ("llama.attention.head_count_kv", np.array([2, 1])),
        ("llama.attention.head_count_kv", []),
        ("llama.attention.layer_norm_rms_epsilon", None),
        ("llama.rope.dimension_count", 32),
        ("llama.rope.scaling.type", "ntk"),
        ("llama.expert_count", 8),
        ("llama.context_length", None),
    ],
)
def test_gguf_misfits_name_file_and_key(key: str, value: Any) -> None:
    with pytest.raises(ModelFileError, match=r"x\.gguf") as raised:
        LlamaArgs.from_gguf(GGUF | {key: value}, "x.gguf")
    assert key in str(raised.value) or "llama.attention.key_length" in str(raised.value)


def test_a_mixture_that_is_read_as_a_llama_is_told_its_architecture() -> None:
    with pytest.raises(ModelFileError, match=r"x\.gguf: key 'llama\.expert_count' is 8: .* mixtral"):
        LlamaArgs.from_gguf(GGUF | {"llama.expert_count": 8}, "x.gguf")


def test_an_unknown_architecture_is_told_what_is_supported() -> None:
    with pytest.raises(ModelFileError, match=r"x\.gguf: architecture 'mamba' is not supported; .*LlamaForCausalLM"):
        find_family("mamba", "x.gguf")
    assert find_family("llama", "x.gguf") == find_family("LlamaForCausalLM", "config.json")


def test_files_without_keys_for_it_are_tied_and_biased_as_their_tensors_show() -> None:
    hf = hf_llama(attention_bias=True, tie_word_embeddings=True)
    tensors = dict(hf.state_dict())
    del tensors["lm_head.weight"]
    known = LlamaArgs.from_hf(hf.config.to_dict())
    args = replace(known, tie_word_embeddings=None)
    model = LlamaForCausalLM(args, DictSource(tensors))
    assert model.head.weight is model.embedding.weight
    assert our_llama(hf).head.weight is not None
