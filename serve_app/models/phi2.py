"""Phi-1, 1.5 and 2: layer norms, attention and MLP side by side, partial rotation, biases, the head too."""

from dataclasses import dataclass
from typing import Any, ClassVar

from serve_app.layers.attention import Attention
from serve_app.layers.decoder import Decoder, ParallelBlock
from serve_app.layers.mlp import PlainMLP
from serve_app.layers.step import AngleTable
from serve_app.models import decoder_parts as parts
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.models.decoder_args import DecoderArgs, check_rotary, common_from_gguf, common_from_hf
from serve_app.models.gguf_form import GgufForm
from serve_app.models.layer_weights import LayerWeights
from serve_app.models.rope_config import rope_from_gguf, rope_from_hf

_FUSED_QKV = "self_attn.qkv_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phi2Args(DecoderArgs):
    """See DecoderArgs."""

    GGUF: ClassVar[GgufForm] = GgufForm("phi2", norm_eps="attention.layer_norm_epsilon", pre_tokenizer="phi-2")
    NORM_EPS: ClassVar[str] = "layer_norm_eps"

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "Phi2Args":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "gelu_new", ("gelu_new",))
        if reader.get("qk_layernorm"):
            raise reader.fail("qk_layernorm", "is set, which no published model has")
        common = common_from_hf(reader, eps_key=cls.NORM_EPS, eps=1e-5)
        args = cls(**common, rope=rope_from_hf(reader, common["head_dim"], share=0.5))
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "Phi2Args":
        """See ModelArgs."""
        reader = ConfigReader(metadata, file)
        args = cls(**common_from_gguf(reader, cls.GGUF), rope=rope_from_gguf(reader, cls.GGUF))
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


class PhiForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: Phi2Args, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).layer_norm("model.final_layernorm", args.hidden_size, args.norm_eps)
        rotary = parts.rotary(args, weights, norm.device)
        embedding = parts.embedding(args, weights)
        blocks = [self._block(layer, weights, rotary) for layer in range(args.n_layers)]
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))

    def _block(self, layer: int, weights: WeightSource, rotary: AngleTable) -> ParallelBlock:
        args, of_layer = self.args, LayerWeights(weights, f"model.layers.{layer}.")
        hidden, inner = args.hidden_size, args.intermediate_size
        if of_layer.has(f"{_FUSED_QKV}.weight"):  # older GGUF files
            qkv = of_layer.linear([_FUSED_QKV], [sum(args.qkv_sizes)], hidden, True)
        else:
            qkv = of_layer.linear(parts.QKV, args.qkv_sizes, hidden, True)
        return ParallelBlock(
            of_layer.layer_norm("input_layernorm", hidden, args.norm_eps),
            Attention(
                qkv,
                of_layer.linear(["self_attn.dense"], [hidden], args.n_heads * args.head_dim, True),
                rotary,
                parts.attention_shape(args, layer),
            ),
            PlainMLP(
                of_layer.linear(["mlp.fc1"], [inner], hidden, True),
                of_layer.linear(["mlp.fc2"], [hidden], inner, True),
                "gelu_tanh",
            ),
        )
