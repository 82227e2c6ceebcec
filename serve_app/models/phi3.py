"""Phi-3 and 3.5, mini and medium: fused qkv and gate_up, longrope, a window where the configuration has one."""

from dataclasses import dataclass
from typing import Any, ClassVar

from serve_app.layers.attention import Attention
from serve_app.layers.decoder import Decoder, PreNormBlock
from serve_app.layers.mlp import GatedMLP
from serve_app.layers.step import AngleTable
from serve_app.models import decoder_parts as parts
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.models.decoder_args import DecoderArgs, check_rotary, common_from_gguf, common_from_hf
from serve_app.models.gguf_form import GgufForm
from serve_app.models.layer_weights import LayerWeights
from serve_app.models.rope_config import rope_from_gguf, rope_from_hf
from serve_app.models.window_config import every_layer, windows_from_gguf, windows_from_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class Phi3Args(DecoderArgs):
    """See DecoderArgs."""

    GGUF: ClassVar[GgufForm] = GgufForm("phi3", {"sliding_window": "attention.sliding_window"})

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "Phi3Args":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "silu", ("silu",))
        common = common_from_hf(reader, eps=1e-5)
        args = cls(
            **common,
            rope=rope_from_hf(reader, common["head_dim"]),
            windows=windows_from_hf(reader, common["n_layers"], every_layer),
        )
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "Phi3Args":
        """See ModelArgs."""
        reader = ConfigReader(metadata, file)
        common = common_from_gguf(reader, cls.GGUF)
        args = cls(
            **common,
            rope=rope_from_gguf(reader, cls.GGUF, has_longrope=True),
            windows=windows_from_gguf(reader, cls.GGUF, common["n_layers"], every_layer),
        )
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


class Phi3ForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: Phi3Args, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).rms_norm("model.norm", args.hidden_size, args.norm_eps)
        rotary = parts.rotary(args, weights, norm.device)
        embedding = parts.embedding(args, weights)
        blocks = [self._block(layer, weights, rotary) for layer in range(args.n_layers)]
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))

    def _block(self, layer: int, weights: WeightSource, rotary: AngleTable) -> PreNormBlock:
        args, of_layer = self.args, LayerWeights(weights, f"model.layers.{layer}.")
        hidden, queries = args.hidden_size, args.n_heads * args.head_dim
        return PreNormBlock(
            of_layer.rms_norm("input_layernorm", hidden, args.norm_eps),
            Attention(
                of_layer.linear(["self_attn.qkv_proj"], [sum(args.qkv_sizes)], hidden, False),
                of_layer.linear(["self_attn.o_proj"], [hidden], queries, False),
                rotary,
                parts.attention_shape(args, layer),
            ),
            of_layer.rms_norm("post_attention_layernorm", hidden, args.norm_eps),
            GatedMLP(
                of_layer.linear(["mlp.gate_up_proj"], [2 * args.intermediate_size], hidden, False),
                parts.down(args, of_layer),
            ),
        )
