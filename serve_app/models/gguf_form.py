"""How GGUF writes a family: its keys and the order of its rows, stated once for reading and for writing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

# What every decoder's args hold → its key, behind the architecture's name. Keys: ggml's docs/gguf.md.
COMMON_KEYS: Final[Mapping[str, str]] = {
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
}

# Layer norms on both sides of attention and MLP (Gemma 2 and 3), which other families call otherwise.
SANDWICH_NAMES: Final[Mapping[str, str]] = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True, slots=True)
class GgufForm:
    """architecture: what the file calls the family; its keys begin with it.

    keys: attributes of the family's args → keys, beside COMMON_KEYS. norm_eps: the key of the norms' epsilon.
    layer_names: a layer's tensors that this family alone names so, see loaders.name_map. has_paired_rotary: rows 2i and
    2i + 1 of each head of q and k belong together, not i and i + head_dim / 2. pre_tokenizer: what the family's
    files call their way of cutting texts, where several names mean the same.
    """

    architecture: str
    keys: Mapping[str, str] = field(default_factory=dict)
    norm_eps: str = "attention.layer_norm_rms_epsilon"
    layer_names: Mapping[str, str] = field(default_factory=dict)
    has_paired_rotary: bool = False
    pre_tokenizer: str | None = None

    def key(self, name: str) -> str:
        """The whole key of an attribute; KeyError for one without."""
        if name == "norm_eps":
            return f"{self.architecture}.{self.norm_eps}"
        return f"{self.architecture}.{COMMON_KEYS.get(name) or self.keys[name]}"

    def names(self) -> tuple[str, ...]:
        """All attributes that have a key."""
        return (*COMMON_KEYS, "norm_eps", *self.keys)
