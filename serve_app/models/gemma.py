"""Gemma 1: norm weights kept as differences from 1, embeddings scaled by the root of their width, tied head."""

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
class GemmaArgs(DecoderArgs):
    """norm_offset: what is added to norm weights; GGUF's have it in them already."""

    GGUF: ClassVar[GgufForm] = GgufForm("gemma")

    norm_offset: float = 0.0

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "GemmaArgs":
        """See ModelArgs. Published files say hidden_act "gelu" and mean the approximation by tanh."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "gelu", ("gelu", "gelu_pytorch_tanh"))
        common = common_from_hf(reader, is_tied=True)
        args = cls(**common, rope=rope_from_hf(reader, common["head_dim"]), norm_offset=1.0)
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "GemmaArgs":
        """See ModelArgs."""
        reader = ConfigReader(metadata, file)
        args = cls(**common_from_gguf(reader, cls.GGUF), rope=rope_from_gguf(reader, cls.GGUF))
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


class GemmaForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: GemmaArgs, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        like = (args.hidden_size, args.norm_eps, args.norm_offset)
        norm = LayerWeights(weights).rms_norm("model.norm", *like)
        rotary = parts.rotary(args, weights, norm.device)
        embedding = parts.embedding(args, weights, args.hidden_size**0.5)
        blocks = []
        for layer in range(args.n_layers):
            of_layer = LayerWeights(weights, f"model.layers.{layer}.")
            blocks.append(
                PreNormBlock(
                    of_layer.rms_norm("input_layernorm", *like),
                    parts.attention(args, of_layer, rotary, parts.attention_shape(args, layer)),
                    of_layer.rms_norm("post_attention_layernorm", *like),
                    parts.gated_mlp(args, of_layer, "gelu_tanh"),
                )
            )
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))
