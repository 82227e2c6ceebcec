"""StarCoder 2: layer norms with bias, grouped queries, a plain MLP, biases, a window where asked for."""

from dataclasses import dataclass
from typing import Any, ClassVar

from serve_app.layers.decoder import Decoder, PreNormBlock
from serve_app.layers.mlp import PlainMLP
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
class Starcoder2Args(DecoderArgs):
    """use_bias: of all linears except the head; None = as the file's tensors show."""

    GGUF: ClassVar[GgufForm] = GgufForm(
        "starcoder2",
        {"sliding_window": "attention.sliding_window"},
        norm_eps="attention.layer_norm_epsilon",
        pre_tokenizer="starcoder",
    )
    NORM_EPS: ClassVar[str] = "norm_epsilon"

    use_bias: bool | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "Starcoder2Args":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
        common = common_from_hf(reader, eps_key=cls.NORM_EPS, eps=1e-5, is_tied=True)
        args = cls(
            **common,
            rope=rope_from_hf(reader, common["head_dim"]),
            windows=windows_from_hf(reader, common["n_layers"], every_layer),
            use_bias=reader.flag("use_bias", True),
        )
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "Starcoder2Args":
        """See ModelArgs."""
        reader = ConfigReader(metadata, file)
        common = common_from_gguf(reader, cls.GGUF)
        args = cls(
            **common,
            rope=rope_from_gguf(reader, cls.GGUF),
            windows=windows_from_gguf(reader, cls.GGUF, common["n_layers"], every_layer),
        )
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


class Starcoder2ForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: Starcoder2Args, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).layer_norm("model.norm", args.hidden_size, args.norm_eps)
        rotary = parts.rotary(args, weights, norm.device)
        embedding = parts.embedding(args, weights)
        blocks = [self._block(layer, weights, rotary) for layer in range(args.n_layers)]
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))

    def _block(self, layer: int, weights: WeightSource, rotary: AngleTable) -> PreNormBlock:
        args, of_layer = self.args, LayerWeights(weights, f"model.layers.{layer}.")
        hidden, inner, bias = args.hidden_size, args.intermediate_size, args.use_bias
        shape = parts.attention_shape(args, layer)
        return PreNormBlock(
            of_layer.layer_norm("input_layernorm", hidden, args.norm_eps),
            parts.attention(args, of_layer, rotary, shape, qkv_bias=bias, out_bias=bias),
            of_layer.layer_norm("post_attention_layernorm", hidden, args.norm_eps),
            PlainMLP(
                of_layer.linear(["mlp.c_fc"], [inner], hidden, bias),
                of_layer.linear(["mlp.c_proj"], [hidden], inner, bias),
                "gelu_tanh",
            ),
        )
