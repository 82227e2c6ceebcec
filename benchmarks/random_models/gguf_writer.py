"""Writes a random model as GGUF, one tensor in memory at a time."""

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from benchmarks.random_models.shapes import PLAIN_ROPE, Shape, Tensor
from benchmarks.random_models.values import DType, random_values, rounded, stored
from benchmarks.random_models.vocabulary import BpeVocabulary
from serve_app.layers.rope_scaling import inverse_frequencies
from serve_app.loaders.name_map import gguf_name, half_split_order, rotary_heads

_TYPES = {"bf16": gguf.GGMLQuantizationType.BF16, "f16": gguf.GGMLQuantizationType.F16}
_FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "f16": gguf.LlamaFileType.MOSTLY_F16}
_ROPE_DIVISORS = "rope_freqs.weight"


def write_gguf(path: Path, shape: Shape, vocabulary: BpeVocabulary, dtype: DType, seed: int) -> None:
    """A file of architecture llama; overwrites the path. Norms are rounded to the dtype and kept as float32."""
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, shape, vocabulary, dtype)
    divisors = _rope_divisors(shape)
    if divisors is not None:
        writer.add_tensor_info(_ROPE_DIVISORS, divisors.shape, divisors.dtype, divisors.nbytes)
    for tensor in shape.tensors():
        is_norm = tensor.kind == "norm"
        kind = gguf.GGMLQuantizationType.F32 if is_norm else _TYPES[dtype]
        num_bytes = tensor.size * (4 if is_norm else 2)
        writer.add_tensor_info(gguf_name(tensor.name), tensor.shape, np.dtype(np.float32), num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    for tensor in shape.tensors():
        values = _in_file_order(shape, tensor, random_values(shape, tensor, seed))
        writer.write_tensor_data(rounded(values, dtype) if tensor.kind == "norm" else stored(values, dtype))
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape, vocabulary: BpeVocabulary, dtype: DType) -> None:
    writer.add_name(f"{shape.name}, random weights")
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(vocabulary.metadata()["tokenizer.chat_template"])


def _rope_divisors(shape: Shape) -> NDArray[np.float32] | None:
    """What GGUF has in place of Llama 3's scaling: a divisor for each frequency."""
    if shape.rope == PLAIN_ROPE:
        return None
    plain = inverse_frequencies(shape.head_dim, shape.rope_theta, PLAIN_ROPE)
    scaled = inverse_frequencies(shape.head_dim, shape.rope_theta, shape.rope)
    return np.asarray((plain / scaled).numpy())


def _in_file_order(shape: Shape, tensor: Tensor, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """q and k with the rows of a head in pairs."""
    heads = rotary_heads("llama", tensor.name, shape.n_heads, shape.n_kv_heads)
    if heads is None:
        return values
    in_pairs = np.empty_like(values)
    in_pairs[half_split_order(values.shape[0], heads).numpy()] = values
    return in_pairs
