"""Writes a random model as a Hugging Face folder, one tensor in memory at a time."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import decoders, processors

from benchmarks.random_models.shapes import PLAIN_ROPE, Shape, Tensor
from benchmarks.random_models.values import DType, random_values, stored
from benchmarks.random_models.vocabulary import CHAT_TEMPLATE, BpeVocabulary
from serve_app.text.gguf_vocab import vocabulary_from_gguf

_TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16"}


# The values of a shape's tensor for a seed, float32.
Values = Callable[[Shape, Tensor, int], NDArray[np.float32]]


def write_folder(
    folder: Path, shape: Shape, vocabulary: BpeVocabulary, dtype: DType, seed: int, values: Values = random_values
) -> None:
    """config.json, tokenizer.json and one model.safetensors, all values of the dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config(shape, vocabulary, dtype))
    write_tokenizer(folder, shape.context, vocabulary)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shape.tensors():
        begin, end = end, end + tensor.size * 2
        header[tensor.name] = {"dtype": dtype.upper(), "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in shape.tensors():
            stored(values(shape, tensor, seed), dtype).tofile(file)


def _config(shape: Shape, vocabulary: BpeVocabulary, dtype: DType) -> dict[str, Any]:
    rope = None
    if shape.rope != PLAIN_ROPE:
        rope = {
            "rope_type": shape.rope.kind,
            "factor": shape.rope.factor,
            "low_freq_factor": shape.rope.low_freq_factor,
            "high_freq_factor": shape.rope.high_freq_factor,
            "original_max_position_embeddings": shape.rope.original_max_position_embeddings,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": rope,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.is_tied,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "torch_dtype": _TORCH_NAMES[dtype],
    }


def write_tokenizer(folder: Path, context: int, vocabulary: BpeVocabulary) -> None:
    """tokenizer.json and tokenizer_config.json."""
    backend = vocabulary_from_gguf(vocabulary.metadata()).make_backend()
    bos, eos = vocabulary.tokens[vocabulary.bos_id], vocabulary.tokens[vocabulary.eos_id]
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, vocabulary.bos_id)]
    )
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
