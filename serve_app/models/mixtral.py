"""Mixtral: Mistral's attention, and in place of the MLP the renormalised sum of the two likeliest of its experts."""

from dataclasses import dataclass
from typing import Any, ClassVar

from serve_app.layers.decoder import Decoder, PreNormBlock
from serve_app.layers.step import AngleTable, Routing
from serve_app.models import decoder_parts as parts
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.models.decoder_args import DecoderArgs, check_rotary, common_from_gguf, common_from_hf
from serve_app.models.gguf_form import GgufForm
from serve_app.models.layer_weights import LayerWeights
from serve_app.models.mixture_parts import MIXTRAL_NAMES, expert_counts, mixture
from serve_app.models.rope_config import rope_from_gguf, rope_from_hf
from serve_app.models.window_config import every_layer, windows_from_gguf, windows_from_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtralArgs(DecoderArgs):
    """intermediate_size: of each expert."""

    GGUF: ClassVar[GgufForm] = GgufForm(
        "llama",
        {
            "sliding_window": "attention.sliding_window",
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
        },
        has_paired_rotary=True,
    )

    num_local_experts: int
    num_experts_per_tok: int

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "MixtralArgs":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "silu", ("silu",))
        common = common_from_hf(reader, eps=1e-5)
        num_experts, top_k = expert_counts(reader, "num_local_experts", "num_experts_per_tok")
        args = cls(
            **common,
            rope=rope_from_hf(reader, common["head_dim"]),
            windows=windows_from_hf(reader, common["n_layers"], every_layer),
            num_local_experts=num_experts,
            num_experts_per_tok=top_k,
        )
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "MixtralArgs":
        """See ModelArgs. GGUF's name of the architecture is llama; that there are experts tells them apart."""
        reader, key = ConfigReader(metadata, file), cls.GGUF.key
        common = common_from_gguf(reader, cls.GGUF)
        num_experts, top_k = expert_counts(reader, key("num_local_experts"), key("num_experts_per_tok"))
        args = cls(
            **common,
            rope=rope_from_gguf(reader, cls.GGUF),
            windows=windows_from_gguf(reader, cls.GGUF, common["n_layers"], every_layer),
            num_local_experts=num_experts,
            num_experts_per_tok=top_k,
        )
        check_rotary(args, reader, key("head_dim"))
        return args


class MixtralForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: MixtralArgs, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).rms_norm("model.norm", args.hidden_size, args.norm_eps)
        embedding, rotary = parts.embedding(args, weights), parts.rotary(args, weights, norm.device)
        blocks = [_block(args, weights, layer, rotary) for layer in range(args.n_layers)]
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))


def _block(args: MixtralArgs, weights: WeightSource, layer: int, rotary: AngleTable) -> PreNormBlock:
    prefix = f"model.layers.{layer}."
    own, hidden = LayerWeights(weights, prefix), args.hidden_size
    routing = Routing(args.num_experts_per_tok, is_renormalised=True)
    sizes = (args.num_local_experts, hidden, args.intermediate_size)
    return PreNormBlock(
        own.rms_norm("input_layernorm", hidden, args.norm_eps),
        parts.attention(args, own, rotary, parts.attention_shape(args, layer)),
        own.rms_norm("post_attention_layernorm", hidden, args.norm_eps),
        mixture(weights, f"{prefix}block_sparse_moe.", MIXTRAL_NAMES, sizes, routing),
    )
