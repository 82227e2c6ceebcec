"""The facts that every decoder's configuration holds, and how both formats name them."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from serve_app.models.config_reader import ConfigReader
from serve_app.models.gguf_form import COMMON_KEYS, GgufForm
from serve_app.models.rope_config import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderArgs:
    """What families' args have in common.

    norm_eps: of all norms. tie_word_embeddings: None = as the file's tensors show (GGUF has no key for it). windows:
    for each layer the keys that a query sees, itself included, 0 = all; empty = all in every layer. GGUF: see GgufForm.
    """

    GGUF: ClassVar[GgufForm]

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
    n_heads = reader.count("num_attention_heads")
    hidden_size = reader.count("hidden_size")
    fields = {
        "n_layers": reader.count("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": reader.count("num_key_value_heads", n_heads),
        "head_dim": reader.count("head_dim", max(1, hidden_size // n_heads)),
        "hidden_size": hidden_size,
        "intermediate_size": reader.count("intermediate_size"),
        "vocab_size": reader.count("vocab_size"),
        "max_position_embeddings": reader.count("max_position_embeddings", 2048),
        "norm_eps": reader.number(eps_key, eps),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", is_tied),
    }
    _check_groups(fields, reader, "num_key_value_heads")
    return fields


def common_from_gguf(reader: ConfigReader, form: GgufForm) -> dict[str, Any]:
    """DecoderArgs' fields of a GGUF, without rope and windows."""
    tokens = reader.get("tokenizer.ggml.tokens")
    defaults = {"vocab_size": None if tokens is None else len(tokens)}
    fields: dict[str, Any] = {}
    for name in COMMON_KEYS:
        if name == "n_kv_heads":
            defaults[name] = fields["n_heads"]
        elif name == "head_dim":
            defaults[name] = max(1, reader.count(form.key("hidden_size")) // fields["n_heads"])
        fields[name] = reader.count(form.key(name), defaults.get(name))
    fields["norm_eps"] = reader.number(form.key("norm_eps"))
    _check_groups(fields, reader, form.key("n_kv_heads"))
    return fields


def check_rotary(args: DecoderArgs, reader: ConfigReader, key: str) -> None:
    """ModelFileError where so many elements of a head cannot be rotated, or not with so many divisors."""
    if args.rotary_dim % 2 or not 0 < args.rotary_dim <= args.head_dim:
        raise reader.fail(key, f"is {args.head_dim}, of which {args.rotary_dim} elements cannot be rotated")
    for name in ("short_factor", "long_factor"):
        count = len(getattr(args.rope.scaling, name))
        if count and count != args.rotary_dim // 2:
            raise reader.fail(name, f"has {count} numbers, the heads need {args.rotary_dim // 2}")


def _check_groups(fields: dict[str, Any], reader: ConfigReader, key: str) -> None:
    if fields["n_heads"] % fields["n_kv_heads"]:
        raise reader.fail(key, f"is {fields['n_kv_heads']}, which does not divide the {fields['n_heads']} heads")
