"""Gemma 3, text: Gemma 2's blocks without its caps, a norm over each query and key head, five windows to one full layer
with a rotary base for each of the two kinds."""

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
from serve_app.models.rope_config import RopeConfig, rope_from_gguf, scaling_from_hf, unscaled
from serve_app.models.window_config import windows_from_gguf, windows_from_hf

_PATTERN = 6
_LAYERS_OF_27B = 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3Args(DecoderArgs):
    """norm_offset: see GemmaArgs. rope is that of full layers, local_rope that of layers with a window."""

    GGUF: ClassVar[GgufForm] = GgufForm(
        "gemma3",
        {
            "sliding_window": "attention.sliding_window",
            "sliding_window_pattern": "attention.sliding_window_pattern",
            "local_theta": "rope.freq_base_swa",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        layer_names=SANDWICH_NAMES,
    )

    local_rope: RopeConfig
    query_pre_attn_scalar: float
    attn_logit_softcapping: float = 0.0
    final_logit_softcapping: float = 0.0
    norm_offset: float = 0.0

    @property
    def local_theta(self) -> float:
        """The rotary base of layers with a window."""
        return self.local_rope.theta

    @property
    def sliding_window_pattern(self) -> int:
        """The number of the first layer without a window, counted from 1; GGUF repeats it. 0 = there is none."""
        return next((layer + 1 for layer, window in enumerate(self.windows) if not window), 0)

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "Gemma3Args":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
        if reader.get("use_bidirectional_attention"):
            raise reader.fail("use_bidirectional_attention", "is set, which no text is written with")
        common = common_from_hf(reader, is_tied=True)
        pattern = reader.count("sliding_window_pattern", _PATTERN)
        rope, local_rope = _ropes_from_hf(reader)
        if rope.scaling.kind in ("dynamic", "longrope"):
            # Rows of the two tables would not be the same positions.
            raise reader.fail("rope_scaling", f"is {rope.scaling.kind!r}, which is not supported beside a local rope")
        args = cls(
            **common,
            rope=rope,
            local_rope=local_rope,
            windows=windows_from_hf(reader, common["n_layers"], lambda layer: (layer + 1) % pattern != 0, default=4096),
            query_pre_attn_scalar=reader.number("query_pre_attn_scalar", 256.0),
            attn_logit_softcapping=reader.number_or_none("attn_logit_softcapping"),
            final_logit_softcapping=reader.number_or_none("final_logit_softcapping"),
            norm_offset=1.0,
        )
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "Gemma3Args":
        """See ModelArgs."""
        reader = ConfigReader(metadata, file)
        common = common_from_gguf(reader, cls.GGUF)
        pattern = reader.count(cls.GGUF.key("sliding_window_pattern"), _PATTERN)
        rope = rope_from_gguf(reader, cls.GGUF)
        args = cls(
            **common,
            rope=rope,
            local_rope=unscaled(rope, reader.number(cls.GGUF.key("local_theta"), 10000.0)),
            windows=windows_from_gguf(reader, cls.GGUF, common["n_layers"], lambda layer: (layer + 1) % pattern != 0),
            query_pre_attn_scalar=score_divisor(common, _LAYERS_OF_27B),
            final_logit_softcapping=reader.number_or_none(cls.GGUF.key("final_logit_softcapping")),
        )
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


def _ropes_from_hf(reader: ConfigReader) -> tuple[RopeConfig, RopeConfig]:
    """Of full layers and of those with a window."""
    nested = reader.section("rope_parameters")
    if nested is not None:
        found = []
        for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4)):
            section = nested.section(kind) or ConfigReader({}, nested.file)
            rope = RopeConfig(section.number("rope_theta", theta), None, scaling_from_hf(reader, section))
            found.append(rope)
        return found[0], found[1]
    section = reader.section("rope_scaling") or ConfigReader({}, reader.file)
    rope = RopeConfig(reader.number("rope_theta", 1e6), None, scaling_from_hf(reader, section))
    return rope, unscaled(rope, reader.number("rope_local_base_freq", 1e4))


class Gemma3ForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: Gemma3Args, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).rms_norm("model.norm", args.hidden_size, args.norm_eps, args.norm_offset)
        rotary = parts.rotary(args, weights, norm.device)
        local_rotary = parts.rotary(args, weights, norm.device, args.local_rope)
        embedding = parts.embedding(args, weights, args.hidden_size**0.5)
        scale = args.query_pre_attn_scalar**-0.5
        blocks: list[Block] = []
        for layer in range(args.n_layers):
            of_layer = LayerWeights(weights, f"model.layers.{layer}.")
            attention = parts.attention(
                args,
                of_layer,
                local_rotary if args.window(layer) else rotary,
                parts.attention_shape(args, layer, scale, args.attn_logit_softcapping),
                head_norms=parts.head_norms(args, of_layer, args.norm_offset),
            )
            blocks.append(sandwich(args, of_layer, attention, args.norm_offset))
        head = parts.head(args, weights, embedding)
        super().__init__(embedding, blocks, norm, head, args.final_logit_softcapping)
