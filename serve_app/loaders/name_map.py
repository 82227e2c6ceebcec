"""GGUF's tensor names for those of Hugging Face checkpoints, and the order of its q and k rows.

Names: gguf's tensor-name table. What a family has of its own is said in its GgufForm.
"""

import re
from typing import Final

import torch
from torch import Tensor

from serve_app.models.registry import gguf_form

_GLOBAL: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
}
_OF_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_OF_MIXTURE: Final = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
}
# Files of before April 2024 have a tensor for each expert.
_OF_EXPERT: Final = {
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "w1": "ffn_gate",
    "w3": "ffn_up",
    "w2": "ffn_down",
}
_EXPERT: Final = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(name: str, architecture: str = "llama") -> str:
    """GGUF's name of a checkpoint's tensor; one without a rule ("rope_freqs.weight") stays as it is."""
    stem, dot, kind = name.rpartition(".")
    if stem in _GLOBAL:
        return f"{_GLOBAL[stem]}{dot}{kind}"
    expert = _EXPERT.fullmatch(stem)
    if expert and expert[3] in _OF_EXPERT:
        return f"blk.{expert[1]}.{_OF_EXPERT[expert[3]]}.{expert[2]}{dot}{kind}"
    match = _LAYER.fullmatch(stem)
    if match and match[2] in _OF_MIXTURE:
        return f"blk.{match[1]}.{_OF_MIXTURE[match[2]]}{dot}{kind}"
    if match:
        stored = gguf_form(architecture).layer_names.get(match[2], _OF_LAYER.get(match[2]))
        if stored is not None:
            return f"blk.{match[1]}.{stored}{dot}{kind}"
    return name


def rotary_heads(architecture: str, name: str, n_heads: int, n_kv_heads: int) -> int | None:
    """How many heads the rows of this tensor hold in GGUF's paired order; None where its rows need no reordering."""
    if not gguf_form(architecture).has_paired_rotary:
        return None
    if ".self_attn.q_proj." in name:
        return n_heads
    if ".self_attn.k_proj." in name:
        return n_kv_heads
    return None


def half_split_order(num_rows: int, heads: int) -> Tensor:
    """[num_rows] int64: gathering paired rows in this order gives each head's first components, then its second ones.

    The rotary embedding turns component i with i + head_dim / 2 in Hugging Face's order; GGUF has the two side by side.
    ValueError where the rows are no whole, even number for every head.
    """
    if heads < 1 or num_rows % (2 * heads):
        raise ValueError(f"{num_rows} rows cannot be split into {heads} heads of even size")
    return torch.arange(num_rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
