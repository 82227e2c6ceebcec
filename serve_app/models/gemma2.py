"""Gemma 2: Gemma's norms on both sides of attention and MLP, capped scores and logits, every other layer a window."""

from dataclasses import dataclass
from typing import Any, ClassVar

from serve_app.layers.decoder import Block, Decoder
from serve_app.models import decoder_parts as parts
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.models.decoder_args import DecoderArgs, check_rotary, common_from_gguf, common_from_hf
from serve_app.models.gemma_parts import sandwich, score_divisor
from serve_app.models.gguf_form import SANDWICH_NAMES, GgufForm
from serve_app.models.layer_weights import LayerWeights
from serve_app.models.rope_config import rope_from_gguf, rope_from_hf
from serve_app.models.window_config import windows_from_gguf, windows_from_hf

_LAYERS_OF_27B = 46


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma2Args(DecoderArgs):
    """norm_offset: see GemmaArgs. query_pre_attn_scalar: scores are divided by its root. Caps: 0 = none."""

    GGUF: ClassVar[GgufForm] = GgufForm(
        "gemma2",
        {
            "sliding_window": "attention.sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        layer_names=SANDWICH_NAMES,
    )

    query_pre_attn_scalar: float
    attn_logit_softcapping: float
    final_logit_softcapping: float
    norm_offset: float = 0.0

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "Gemma2Args":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
        common = common_from_hf(reader, is_tied=True)
        args = cls(
            **common,
            rope=rope_from_hf(reader, common["head_dim"]),
            windows=windows_from_hf(reader, common["n_layers"], _is_sliding, default=4096),
            query_pre_attn_scalar=reader.number("query_pre_attn_scalar", 256.0),
            attn_logit_softcapping=reader.number_or_none("attn_logit_softcapping", 50.0),
            final_logit_softcapping=reader.number_or_none("final_logit_softcapping", 30.0),
            norm_offset=1.0,
        )
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "Gemma2Args":
        """See ModelArgs."""
        reader = ConfigReader(metadata, file)
        common = common_from_gguf(reader, cls.GGUF)
        args = cls(
            **common,
            rope=rope_from_gguf(reader, cls.GGUF),
            windows=windows_from_gguf(reader, cls.GGUF, common["n_layers"], _is_sliding, default=4096),
            query_pre_attn_scalar=score_divisor(common, _LAYERS_OF_27B),
            attn_logit_softcapping=reader.number_or_none(cls.GGUF.key("attn_logit_softcapping")),
            final_logit_softcapping=reader.number_or_none(cls.GGUF.key("final_logit_softcapping")),
        )
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


def _is_sliding(layer: int) -> bool:
    return layer % 2 == 0


class Gemma2ForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: Gemma2Args, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).rms_norm("model.norm", args.hidden_size, args.norm_eps, args.norm_offset)
        rotary = parts.rotary(args, weights, norm.device)
        embedding = parts.embedding(args, weights, args.hidden_size**0.5)
        scale = args.query_pre_attn_scalar**-0.5
        blocks: list[Block] = []
        for layer in range(args.n_layers):
            of_layer = LayerWeights(weights, f"model.layers.{layer}.")
            shape = parts.attention_shape(args, layer, scale, args.attn_logit_softcapping)
            attention = parts.attention(args, of_layer, rotary, shape)
            blocks.append(sandwich(args, of_layer, attention, args.norm_offset))
        head = parts.head(args, weights, embedding)
        super().__init__(embedding, blocks, norm, head, args.final_logit_softcapping)
