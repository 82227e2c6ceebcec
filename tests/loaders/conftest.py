"""A Llama of a few hundred numbers, written as GGUF or as a Hugging Face folder, whole or with something wrong."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

HIDDEN, HEADS, KV_HEADS, INNER, VOCAB = 32, 4, 2, 64, 16
HEAD_DIM = HIDDEN // HEADS

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
METADATA: dict[str, Any] = {
    "llama.context_length": 64,
    "llama.embedding_length": HIDDEN,
    "llama.block_count": 1,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": VOCAB,
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

Arrays = dict[str, np.ndarray]


def random_tensors() -> Arrays:
    """The tensors of the tiny model by their Hugging Face names, float32."""
    rng = np.random.default_rng(0)
    matrices = {
        "embed_tokens": (VOCAB, HIDDEN), "q_proj": (HIDDEN, HIDDEN), "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "o_proj": (HIDDEN, HIDDEN), "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER), "lm_head": (VOCAB, HIDDEN),
    }  # fmt: skip
    shapes = {name: matrices.get(name.split(".")[-2], (HIDDEN,)) for name in NAMES}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def in_gguf_order(name: str, array: np.ndarray) -> np.ndarray:
    """q and k with the rows of each head in pairs, as converters write them."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return array
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


@pytest.fixture
def tensors() -> Arrays:
    """See random_tensors."""
    return random_tensors()


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """write(quantise=type name, metadata={key: value or None}, tensors={GGUF name: array or None}, …) → path."""

    def write(
        quantise: str = "F32",
        metadata: Mapping[str, Any] = {},
        tensors: Mapping[str, np.ndarray | None] = {},
        arch: str = "llama",
        name: str = "tiny.gguf",
        tensors_per_shard: int = 0,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_per_shard)
        for key, value in (METADATA | dict(metadata)).items():
            if isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_float32(key, value)
        stored: dict[str, np.ndarray | None] = {NAMES[n]: in_gguf_order(n, a) for n, a in random_tensors().items()}
        for tensor_name, array in (stored | dict(tensors)).items():
            if array is None:
                continue
            kind = gguf.GGMLQuantizationType[quantise]
            if array.ndim == 2 and array.dtype == np.float32:
                writer.add_tensor(tensor_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(tensor_name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """write(config={key: value or None}, tensors={name: array or None}) → a folder with one model.safetensors."""

    def write(
        config: Mapping[str, Any] = {},
        tensors: Mapping[str, np.ndarray | None] = {},
        name: str = "tiny",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        values = {k: v for k, v in (CONFIG | dict(config)).items() if v is not None}
        (folder / "config.json").write_text(json.dumps(values))
        stored: dict[str, np.ndarray | None] = {**random_tensors(), **tensors}
        save_file({k: v for k, v in stored.items() if v is not None}, folder / "model.safetensors")
        return folder

    return write


BIG, BIG_INNER, BIG_VOCAB, BIG_LAYERS = 1024, 3072, 4096, 4


@pytest.fixture(scope="session")
def big_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of random bfloat16 numbers, 102 MB."""
    folder = tmp_path_factory.mktemp("big")
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": BIG, "intermediate_size": BIG_INNER,
        "num_hidden_layers": BIG_LAYERS, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": BIG_VOCAB,
        "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (BIG_VOCAB, BIG), "model.norm": (BIG,)}
    for i in range(BIG_LAYERS):
        layer = {
            "input_layernorm": (BIG,), "post_attention_layernorm": (BIG,), "self_attn.q_proj": (BIG, BIG),
            "self_attn.k_proj": (256, BIG), "self_attn.v_proj": (256, BIG), "self_attn.o_proj": (BIG, BIG),
            "mlp.gate_proj": (BIG_INNER, BIG), "mlp.up_proj": (BIG_INNER, BIG), "mlp.down_proj": (BIG, BIG_INNER),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    numbers = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=numbers, dtype=torch.float32).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_torch_file(tensors, folder / "model.safetensors")
    return folder
