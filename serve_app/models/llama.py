"""Llama 1 to 3.3, and Mistral in GGUF: RMS norms, grouped queries, rotary positions, gated MLP, tied or free head."""

from dataclasses import dataclass
from typing import Any, ClassVar

from serve_app.layers.decoder import Decoder, PreNormBlock
from serve_app.models import decoder_parts as parts
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.models.decoder_args import DecoderArgs, check_rotary, common_from_gguf, common_from_hf
from serve_app.models.gguf_form import GgufForm
from serve_app.models.layer_weights import LayerWeights
from serve_app.models.rope_config import rope_from_gguf, rope_from_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaArgs(DecoderArgs):
    """See DecoderArgs. attention_bias, mlp_bias: None = as the file's tensors show (GGUF has no keys for them)."""

    GGUF: ClassVar[GgufForm] = GgufForm("llama", has_paired_rotary=True)

    attention_bias: bool | None = None
    mlp_bias: bool | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "LlamaArgs":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "silu", ("silu",))
        common = common_from_hf(reader)
        args = cls(
            **common, rope=rope_from_hf(reader, common["head_dim"]),
            attention_bias=reader.flag("attention_bias", False), mlp_bias=reader.flag("mlp_bias", False),
        )  # fmt: skip
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "LlamaArgs":
        """See ModelArgs."""
        reader = ConfigReader(metadata, file)
        if num_experts := reader.get("llama.expert_count"):
            raise reader.fail("llama.expert_count", f"is {num_experts}: with experts the architecture is mixtral")
        args = cls(**common_from_gguf(reader, cls.GGUF), rope=rope_from_gguf(reader, cls.GGUF))
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


class LlamaForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: LlamaArgs, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).rms_norm("model.norm", args.hidden_size, args.norm_eps)
        rotary = parts.rotary(args, weights, norm.device)
        embedding = parts.embedding(args, weights)
        blocks = []
        for layer in range(args.n_layers):
            of_layer = LayerWeights(weights, f"model.layers.{layer}.")
            blocks.append(
                PreNormBlock(
                    of_layer.rms_norm("input_layernorm", args.hidden_size, args.norm_eps),
                    parts.attention(
                        args, of_layer, rotary, parts.attention_shape(args, layer),
                        qkv_bias=args.attention_bias, out_bias=args.attention_bias,
                    ),
                    of_layer.rms_norm("post_attention_layernorm", args.hidden_size, args.norm_eps),
                    parts.gated_mlp(args, of_layer, has_bias=args.mlp_bias),
                )
            )  # fmt: skip
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))
