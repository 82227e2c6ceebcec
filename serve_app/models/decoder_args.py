"""The facts that every decoder's configuration holds, and how both formats name them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from serve_app.models.config_reader import ConfigReader
from serve_app.models.gguf_form import GgufForm
from serve_app.models.rope_config import RopeConfig

HF_KEYS: Final[Mapping[str, str]] = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
"""Fields of every decoder's args → keys of config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderArgs:
    """What families' args have in common.

    norm_eps: of all norms. tie_word_embeddings: None = as the file's tensors show (GGUF has no key for it). windows:
    for each layer the keys that a query sees, itself included, 0 = all; empty = all in every layer. GGUF: see GgufForm.
    NORM_EPS: the key of norm_eps in config.json.
    """

    GGUF: ClassVar[GgufForm]
    NORM_EPS: ClassVar[str] = "rms_norm_eps"

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool | None = None
    windows: tuple[int, ...] = ()

    @property
    def rotary_dim(self) -> int:
        """Rotated elements of a head."""
        return self.head_dim if self.rope.dim is None else self.rope.dim

    @property
    def qkv_sizes(self) -> list[int]:
        """Rows of queries, keys and values."""
        return [n * self.head_dim for n in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]

    @property
    def sliding_window(self) -> int:
        """The window of the layers that have one, 0 = none has."""
        return max(self.windows, default=0)

    def window(self, layer: int) -> int:
        """Keys that a query of the layer sees, 0 = all."""
        return self.windows[layer] if self.windows else 0


def common_from_hf(
    reader: ConfigReader, *, eps_key: str = "rms_norm_eps", eps: float = 1e-6, is_tied: bool = False
) -> dict[str, Any]:
    """DecoderArgs' fields of a config.json, without rope and windows. eps, is_tied: where the file is silent."""
    fields = _counts(reader, HF_KEYS.__getitem__, {"max_position_embeddings": 2048})
    fields["norm_eps"] = reader.number(eps_key, eps)
    fields["tie_word_embeddings"] = reader.flag("tie_word_embeddings", is_tied)
    return fields


def common_from_gguf(reader: ConfigReader, form: GgufForm) -> dict[str, Any]:
    """DecoderArgs' fields of a GGUF, without rope and windows."""
    tokens = reader.get("tokenizer.ggml.tokens")
    fields = _counts(reader, form.key, {} if tokens is None else {"vocab_size": len(tokens)})
    fields["norm_eps"] = reader.number(form.key("norm_eps"))
    return fields


def _counts(reader: ConfigReader, key: Callable[[str], str], defaults: dict[str, int]) -> dict[str, Any]:
    """The fields of HF_KEYS. Where the file is silent every head has its own keys, and as much of the width."""
    fields: dict[str, Any] = {}
    for name in HF_KEYS:
        if name == "n_kv_heads":
            defaults[name] = fields["n_heads"]
        elif name == "head_dim":
            defaults[name] = max(1, reader.count(key("hidden_size")) // fields["n_heads"])
        fields[name] = reader.count(key(name), defaults.get(name))
    if fields["n_heads"] % fields["n_kv_heads"]:
        raise reader.fail(
            key("n_kv_heads"), f"is {fields['n_kv_heads']}, which does not divide the {fields['n_heads']} heads"
        )
    return fields


def check_rotary(args: DecoderArgs, reader: ConfigReader, key: str) -> None:
    """ModelFileError where so many elements of a head cannot be rotated, or not with so many divisors."""
    if args.rotary_dim % 2 or not 0 < args.rotary_dim <= args.head_dim:
        raise reader.fail(key, f"is {args.head_dim}, of which {args.rotary_dim} elements cannot be rotated")
    for name in ("short_factor", "long_factor"):
        count = len(getattr(args.rope.scaling, name))
        if count and count != args.rotary_dim // 2:
            raise reader.fail(name, f"has {count} numbers, the heads need {args.rotary_dim // 2}")
