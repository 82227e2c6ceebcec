"""Phi-3.5-MoE: biases everywhere, layer norms, longrope, and two experts a token chosen by sparsemixer."""

from dataclasses import dataclass, replace
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
from serve_app.models.rope_config import RopeConfig, rope_from_gguf, rope_from_hf
from serve_app.models.window_config import every_layer, windows_from_gguf, windows_from_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class PhimoeArgs(DecoderArgs):
    """intermediate_size: of each expert. attention_bias: None = as the file's tensors show. mscales: of longrope's
    short and long set where they differ, None = rope.scaling.magnitude for both (GGUF has one)."""

    GGUF: ClassVar[GgufForm] = GgufForm(
        "phimoe",
        {
            "sliding_window": "attention.sliding_window",
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
        },
    )

    num_local_experts: int
    router_jitter_noise: float = 0.01
    attention_bias: bool | None = None
    mscales: tuple[float, float] | None = None

    @property
    def num_experts_per_tok(self) -> int:
        """Sparsemixer takes two."""
        return 2

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "PhimoeArgs":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "silu", ("silu",))
        common = common_from_hf(reader, eps=1e-5)
        rope, mscales = _rope(reader, common["head_dim"])
        args = cls(
            **common,
            rope=rope,
            mscales=mscales,
            windows=windows_from_hf(reader, common["n_layers"], every_layer),
            num_local_experts=_num_experts(reader, "num_local_experts", "num_experts_per_tok"),
            router_jitter_noise=reader.number("router_jitter_noise", 0.01),
            attention_bias=reader.flag("attention_bias", False),
        )
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "PhimoeArgs":
        """See ModelArgs. The format has no key for the jitter."""
        reader, key = ConfigReader(metadata, file), cls.GGUF.key
        common = common_from_gguf(reader, cls.GGUF)
        args = cls(
            **common,
            rope=rope_from_gguf(reader, cls.GGUF, has_longrope=True),
            windows=windows_from_gguf(reader, cls.GGUF, common["n_layers"], every_layer),
            num_local_experts=_num_experts(reader, key("num_local_experts"), key("num_experts_per_tok")),
        )
        check_rotary(args, reader, key("head_dim"))
        return args


class PhimoeForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: PhimoeArgs, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).layer_norm("model.norm", args.hidden_size, args.norm_eps)
        embedding, rotary = (
            parts.embedding(args, weights),
            parts.rotary(args, weights, norm.device, magnitudes=args.mscales),
        )
        blocks = [_block(args, weights, layer, rotary) for layer in range(args.n_layers)]
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))


def _block(args: PhimoeArgs, weights: WeightSource, layer: int, rotary: AngleTable) -> PreNormBlock:
    prefix, bias = f"model.layers.{layer}.", args.attention_bias
    own, hidden = LayerWeights(weights, prefix), args.hidden_size
    routing = Routing(args.num_experts_per_tok, "sparsemixer", jitter=args.router_jitter_noise)
    sizes = (args.num_local_experts, hidden, args.intermediate_size)
    return PreNormBlock(
        own.layer_norm("input_layernorm", hidden, args.norm_eps),
        parts.attention(args, own, rotary, parts.attention_shape(args, layer), qkv_bias=bias, out_bias=bias),
        own.layer_norm("post_attention_layernorm", hidden, args.norm_eps),
        mixture(weights, f"{prefix}block_sparse_moe.", MIXTRAL_NAMES, sizes, routing),
    )


def _rope(reader: ConfigReader, head_dim: int) -> tuple[RopeConfig, tuple[float, float] | None]:
    """The factor of cosines and sines is given for each set, not computed as Phi-3's is."""
    rope = rope_from_hf(reader, head_dim)
    if rope.scaling.kind != "longrope":
        return rope, None
    nested = reader.section("rope_parameters") or reader.section("rope_scaling")
    assert nested is not None
    short, long = nested.number("short_mscale"), nested.number("long_mscale")
    if short == long:
        return replace(rope, scaling=replace(rope.scaling, magnitude=short)), None
    return rope, (short, long)


def _num_experts(reader: ConfigReader, count_key: str, used_key: str) -> int:
    num_experts, top_k = expert_counts(reader, count_key, used_key)
    if top_k != 2:
        raise reader.fail(used_key, f"is {top_k}; sparsemixer takes 2")
    return num_experts
