"""Granite 3: a Llama whose embeddings, scores, residual and logits have multipliers."""

from dataclasses import dataclass
from typing import Any, ClassVar

from serve_app.layers.decoder import Decoder, PreNormBlock, Sublayer
from serve_app.layers.step import Rows, Step
from serve_app.models import decoder_parts as parts
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.models.decoder_args import DecoderArgs, check_rotary, common_from_gguf, common_from_hf
from serve_app.models.gguf_form import GgufForm
from serve_app.models.layer_weights import LayerWeights
from serve_app.models.rope_config import rope_from_gguf, rope_from_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class GraniteArgs(DecoderArgs):
    """The multipliers by their names in config.json; logits are divided by logits_scaling. Biases: see LlamaArgs."""

    GGUF: ClassVar[GgufForm] = GgufForm(
        "granite",
        {
            "embedding_multiplier": "embedding_scale",
            "attention_multiplier": "attention.scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        has_paired_rotary=True,
        pre_tokenizer="refact",
    )

    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    attention_bias: bool | None = None
    mlp_bias: bool | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "GraniteArgs":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "silu", ("silu",))
        common = common_from_hf(reader)
        args = cls(
            **common,
            rope=rope_from_hf(reader, common["head_dim"]),
            embedding_multiplier=reader.number("embedding_multiplier", 1.0),
            attention_multiplier=reader.number("attention_multiplier", 1.0),
            residual_multiplier=reader.number("residual_multiplier", 1.0),
            logits_scaling=reader.number("logits_scaling", 1.0),
            attention_bias=reader.flag("attention_bias", False),
            mlp_bias=reader.flag("mlp_bias", False),
        )
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "GraniteArgs":
        """See ModelArgs."""
        reader = ConfigReader(metadata, file)
        args = cls(
            **common_from_gguf(reader, cls.GGUF),
            rope=rope_from_gguf(reader, cls.GGUF),
            embedding_multiplier=reader.number(cls.GGUF.key("embedding_multiplier"), 1.0),
            attention_multiplier=reader.number(cls.GGUF.key("attention_multiplier")),
            residual_multiplier=reader.number(cls.GGUF.key("residual_multiplier"), 1.0),
            logits_scaling=reader.number(cls.GGUF.key("logits_scaling"), 1.0),
        )
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


class GraniteForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: GraniteArgs, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).rms_norm("model.norm", args.hidden_size, args.norm_eps)
        rotary = parts.rotary(args, weights, norm.device)
        embedding = parts.embedding(args, weights, args.embedding_multiplier)
        blocks = []
        for layer in range(args.n_layers):
            of_layer = LayerWeights(weights, f"model.layers.{layer}.")
            shape = parts.attention_shape(args, layer, args.attention_multiplier)
            blocks.append(
                PreNormBlock(
                    of_layer.rms_norm("input_layernorm", args.hidden_size, args.norm_eps),
                    self._scaled(
                        parts.attention(
                            args, of_layer, rotary, shape, qkv_bias=args.attention_bias, out_bias=args.attention_bias
                        )
                    ),
                    of_layer.rms_norm("post_attention_layernorm", args.hidden_size, args.norm_eps),
                    self._scaled(parts.gated_mlp(args, of_layer, has_bias=args.mlp_bias)),
                )
            )
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))

    def _scaled(self, sublayer: Sublayer) -> Sublayer:
        def call(x: Rows, step: Step) -> Rows:
            y = sublayer(x, step)
            step.scale(y, self.args.residual_multiplier)
            return y

        return call

    def logits(self, hidden: Rows, step: Step) -> Rows:
        """See CausalLM."""
        logits = super().logits(hidden, step)
        step.scale(logits, 1 / self.args.logits_scaling)
        return logits
