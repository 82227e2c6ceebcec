"""Llama 1 to 3.3, and Mistral in GGUF: RMS norms, grouped queries, rotary positions, gated MLP, tied or free head."""

from dataclasses import dataclass
from typing import Any

import torch

from serve_app.attention.backend import AttentionShape
from serve_app.layers.attention import Attention
from serve_app.layers.embedding import Embedding, OutputHead
from serve_app.layers.linear import Linear
from serve_app.layers.mlp import GatedMLP
from serve_app.layers.norm import Norm
from serve_app.layers.rotary import Rotary, inverse_frequencies
from serve_app.layers.step import Rows, Step
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.models.rope_config import RopeConfig, rope_from_gguf, rope_from_hf


@dataclass(frozen=True, slots=True)
class LlamaArgs:
    """tie_word_embeddings, attention_bias, mlp_bias: None = as the file's tensors show (GGUF has no keys for them)."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "LlamaArgs":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        if reader.get("hidden_act") not in (None, "silu"):
            raise reader.fail("hidden_act", f"is {reader.get('hidden_act')!r}; supported is silu")
        n_heads = reader.count("num_attention_heads")
        head_dim = reader.count("head_dim", max(1, reader.count("hidden_size") // n_heads))
        args = cls(
            n_layers=reader.count("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=reader.count("num_key_value_heads", n_heads),
            head_dim=head_dim,
            hidden_size=reader.count("hidden_size"),
            intermediate_size=reader.count("intermediate_size"),
            vocab_size=reader.count("vocab_size"),
            max_position_embeddings=reader.count("max_position_embeddings", 2048),
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope=rope_from_hf(reader, head_dim),
            tie_word_embeddings=reader.flag("tie_word_embeddings", False),
            attention_bias=reader.flag("attention_bias", False),
            mlp_bias=reader.flag("mlp_bias", False),
        )
        return args._checked(reader, "num_key_value_heads", "head_dim")

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "LlamaArgs":
        """See ModelArgs."""
        reader = ConfigReader(metadata, file)
        if reader.get("llama.expert_count"):
            raise reader.fail("llama.expert_count", "is set: mixtures of experts are not supported")
        tokens = reader.get("tokenizer.ggml.tokens")
        n_heads = reader.count("llama.attention.head_count")
        hidden_size = reader.count("llama.embedding_length")
        args = cls(
            n_layers=reader.count("llama.block_count"),
            n_heads=n_heads,
            n_kv_heads=reader.count("llama.attention.head_count_kv", n_heads),
            head_dim=reader.count("llama.attention.key_length", max(1, hidden_size // n_heads)),
            hidden_size=hidden_size,
            intermediate_size=reader.count("llama.feed_forward_length"),
            vocab_size=reader.count("llama.vocab_size", None if tokens is None else len(tokens)),
            max_position_embeddings=reader.count("llama.context_length"),
            rms_norm_eps=reader.number("llama.attention.layer_norm_rms_epsilon"),
            rope=rope_from_gguf(reader, "llama"),
        )
        return args._checked(reader, "llama.attention.head_count_kv", "llama.attention.key_length")

    @property
    def rotary_dim(self) -> int:
        """Rotated elements of a head."""
        return self.head_dim if self.rope.dim is None else self.rope.dim

    def _checked(self, reader: ConfigReader, kv_key: str, head_key: str) -> "LlamaArgs":
        if self.rope.scaling.kind == "longrope":
            raise reader.fail("rope_type", "is 'longrope', which Llamas do not have")
        if self.n_heads % self.n_kv_heads:
            raise reader.fail(kv_key, f"is {self.n_kv_heads}, which does not divide the {self.n_heads} heads")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise reader.fail(head_key, f"is {self.head_dim}, of which {self.rotary_dim} elements cannot be rotated")
        return self


class LlamaBlock:
    """One layer. Its result is what the next norm adds to the residual."""

    def __init__(self, layer: int, args: LlamaArgs, weights: WeightSource, rotary: Rotary) -> None:
        hidden, prefix = args.hidden_size, f"model.layers.{layer}."
        queries, keys = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim

        def linear(names: list[str], sizes: list[int], in_features: int, has_bias: bool | None) -> Linear:
            names = [prefix + name for name in names]
            if has_bias is None:
                has_bias = weights.has(f"{names[0]}.bias")
            biases = (
                [weights.tensor(f"{n}.bias", (s,)) for n, s in zip(names, sizes, strict=True)] if has_bias else None
            )
            weight = weights.weight([f"{n}.weight" for n in names], sizes, in_features)
            return Linear(weight, None if biases is None else torch.cat(biases))

        def norm(name: str) -> Norm:
            return Norm(weights.tensor(f"{prefix}{name}.weight", (hidden,)), args.rms_norm_eps)

        qkv_names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        self.attention_norm = norm("input_layernorm")
        self.attention = Attention(
            linear(qkv_names, [queries, keys, keys], hidden, args.attention_bias),
            linear(["self_attn.o_proj"], [hidden], queries, args.attention_bias),
            rotary,
            AttentionShape(layer, args.n_heads, args.n_kv_heads, args.head_dim, scale=args.head_dim**-0.5),
        )
        self.mlp_norm = norm("post_attention_layernorm")
        self.mlp = GatedMLP(
            linear(["mlp.gate_proj", "mlp.up_proj"], [args.intermediate_size] * 2, hidden, args.mlp_bias),
            linear(["mlp.down_proj"], [hidden], args.intermediate_size, args.mlp_bias),
        )

    def __call__(self, delta: Rows | None, residual: Rows, step: Step) -> Rows:
        """delta: the block before's result [T, hidden], not yet in residual [T, hidden], which is updated in place."""
        x = self.attention_norm(residual, step) if delta is None else self.attention_norm.add(delta, residual, step)
        x = self.mlp_norm.add(self.attention(x, step), residual, step)
        return self.mlp(x, step)


class LlamaForCausalLM:
    """See CausalLM."""

    def __init__(self, args: LlamaArgs, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        self.embedding = Embedding(weights.weight(["model.embed_tokens.weight"], [args.vocab_size], args.hidden_size))
        norm = weights.tensor("model.norm.weight", (args.hidden_size,))
        frequencies = inverse_frequencies(args.rotary_dim, args.rope.theta, args.rope.scaling).to(norm.device)
        if weights.has("rope_freqs.weight"):
            frequencies = frequencies / weights.tensor("rope_freqs.weight", (args.rotary_dim // 2,))
        rotary = Rotary(frequencies, args.max_position_embeddings, args.rope.scaling.magnitude)
        self.blocks = [LlamaBlock(i, args, weights, rotary) for i in range(args.n_layers)]
        self.norm = Norm(norm, args.rms_norm_eps)
        is_tied = args.tie_word_embeddings
        if is_tied is None:
            is_tied = not weights.has("lm_head.weight")
        self.head = OutputHead(
            self.embedding.weight
            if is_tied
            else weights.weight(["lm_head.weight"], [args.vocab_size], args.hidden_size)
        )

    def forward(self, step: Step) -> Rows:
        """See CausalLM."""
        residual = self.embedding(step)
        delta = None
        for block in self.blocks:
            delta = block(delta, residual, step)
        assert delta is not None
        return self.norm.add(delta, residual, step)

    def logits(self, hidden: Rows, step: Step) -> Rows:
        """See CausalLM."""
        return self.head(hidden, step)
