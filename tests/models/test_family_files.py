"""A family's GGUF file, in llama.cpp's layout, holds the same model as its SafeTensors folder."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from family_cases import SMALL, hf_model
from tiny_llama import full_logits
from torch import Tensor

from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.options import ModelSource

IDS = torch.randint(0, SMALL["vocab_size"], (40,), generator=torch.Generator().manual_seed(2)).tolist()
# Case → GGUF's architecture.
FILES = {
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2, long window": "gemma2",
    "gemma3, published pattern": "gemma3",
    "phi3": "phi3",
    "phi3, window": "phi3",
    "phi3, long": "phi3",
    "phi2": "phi2",
    "granite": "granite",
    "starcoder2": "starcoder2",
}


def write_gguf(path: Path, arch: str, hf: Any) -> None:
    """The model as llama.cpp's converter writes it, by the gguf package's own table of names."""
    config = hf.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    if arch in ("phi2", "starcoder2"):
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    if arch == "phi2":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads // 2)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch in ("gemma2", "gemma3", "phi3") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    rope = config.rope_parameters
    if arch == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if arch == "gemma3":
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    if rope.get("rope_type") == "longrope":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(original))))
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in hf.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, in_gguf(arch, name, tensor, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_gguf(arch: str, name: str, tensor: Tensor, config: Any) -> Tensor:
    """Norms with their 1, q and k of a llama with their rows in pairs."""
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if arch in ("llama", "granite") and heads is not None:
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape).contiguous()
    return tensor


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", FILES)
def test_both_files_hold_the_same_model(
    name: str, backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf = hf_model(name)
    hf.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", FILES[name], hf)
    theirs = hf(torch.tensor([IDS])).logits[0]
    caplog.clear()
    logits = []
    for path in (tmp_path / "hf", tmp_path / "model.gguf"):
        loaded = load_model(resolve(ModelSource(model=str(path))), dtype="f32", device="cpu", is_exact=True)
        logits.append(full_logits(loaded.model, IDS, backend))
    assert not [record for record in caplog.records if "does not use" in record.message]
    assert (logits[0] - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert (logits[1] - logits[0]).abs().max() <= 1e-5 * logits[0].abs().max()
