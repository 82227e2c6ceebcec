"""Qwen 2 and 2.5: a Llama whose queries, keys and values have biases; a window in the upper layers where asked for."""

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
from serve_app.models.window_config import upper_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Args(DecoderArgs):
    """See DecoderArgs."""

    GGUF: ClassVar[GgufForm] = GgufForm("qwen2")

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "Qwen2Args":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "silu", ("silu",))
        common = common_from_hf(reader)
        windows = upper_windows(reader, common["n_layers"])
        args = cls(**common, rope=rope_from_hf(reader, common["head_dim"]), windows=windows)
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "Qwen2Args":
        """See ModelArgs."""
        reader = ConfigReader(metadata, file)
        args = cls(**common_from_gguf(reader, cls.GGUF), rope=rope_from_gguf(reader, cls.GGUF))
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


class Qwen2ForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: Qwen2Args, weights: WeightSource) -> None:
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
                    parts.attention(args, of_layer, rotary, parts.attention_shape(args, layer), qkv_bias=True),
                    of_layer.rms_norm("post_attention_layernorm", args.hidden_size, args.norm_eps),
                    parts.gated_mlp(args, of_layer),
                )
            )
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))
