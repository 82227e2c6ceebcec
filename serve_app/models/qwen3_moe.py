"""Qwen3-MoE: Qwen3's attention with normalised heads, and many small experts of which a token takes a few."""

from dataclasses import dataclass
from typing import Any, ClassVar

from serve_app.layers.decoder import Decoder, PreNormBlock, Sublayer
from serve_app.layers.step import AngleTable, Routing
from serve_app.models import decoder_parts as parts
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.models.decoder_args import DecoderArgs, check_rotary, common_from_gguf, common_from_hf
from serve_app.models.gguf_form import GgufForm
from serve_app.models.layer_weights import LayerWeights
from serve_app.models.mixture_parts import HF_NAMES, expert_counts, mixture, sparse_layers
from serve_app.models.rope_config import rope_from_gguf, rope_from_hf
from serve_app.models.window_config import every_layer, windows_from_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3MoeArgs(DecoderArgs):
    """intermediate_size: of the layers that are no mixtures; sparse: which layers are. attention_bias: None = as the
    file's tensors show."""

    GGUF: ClassVar[GgufForm] = GgufForm(
        "qwen3moe",
        {
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
    )

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    sparse: tuple[bool, ...]
    attention_bias: bool | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "Qwen3MoeArgs":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "silu", ("silu",))
        common = common_from_hf(reader)
        # transformers writes either name.
        count_key = "num_local_experts" if reader.get("num_experts") is None else "num_experts"
        num_experts, top_k = expert_counts(reader, count_key, "num_experts_per_tok")
        has_window = reader.flag("use_sliding_window", False)
        args = cls(
            **common,
            rope=rope_from_hf(reader, common["head_dim"]),
            windows=windows_from_hf(reader, common["n_layers"], every_layer) if has_window else (),
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=reader.count("moe_intermediate_size"),
            norm_topk_prob=reader.flag("norm_topk_prob", False),
            sparse=sparse_layers(reader, common["n_layers"]),
            attention_bias=reader.flag("attention_bias", False),
        )
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "Qwen3MoeArgs":
        """See ModelArgs. The format has no keys for norm_topk_prob and for layers that are no mixtures: factors are
        renormalised and all layers are mixtures, as llama.cpp has it."""
        reader = ConfigReader(metadata, file)
        common = common_from_gguf(reader, cls.GGUF)
        num_experts, top_k = expert_counts(reader, cls.GGUF.key("num_experts"), cls.GGUF.key("num_experts_per_tok"))
        args = cls(
            **common,
            rope=rope_from_gguf(reader, cls.GGUF),
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=reader.count(cls.GGUF.key("moe_intermediate_size")),
            norm_topk_prob=True,
            sparse=(True,) * common["n_layers"],
        )
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


class Qwen3MoeForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: Qwen3MoeArgs, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).rms_norm("model.norm", args.hidden_size, args.norm_eps)
        embedding, rotary = parts.embedding(args, weights), parts.rotary(args, weights, norm.device)
        blocks = [_block(args, weights, layer, rotary) for layer in range(args.n_layers)]
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))


def _block(args: Qwen3MoeArgs, weights: WeightSource, layer: int, rotary: AngleTable) -> PreNormBlock:
    own = LayerWeights(weights, f"model.layers.{layer}.")
    bias, eps = args.attention_bias, args.norm_eps
    norms = parts.head_norms(args, own)
    shape = parts.attention_shape(args, layer)
    return PreNormBlock(
        own.rms_norm("input_layernorm", args.hidden_size, eps),
        parts.attention(args, own, rotary, shape, qkv_bias=bias, out_bias=bias, head_norms=norms),
        own.rms_norm("post_attention_layernorm", args.hidden_size, eps),
        _mlp(args, weights, layer),
    )


def _mlp(args: Qwen3MoeArgs, weights: WeightSource, layer: int) -> Sublayer:
    prefix = f"model.layers.{layer}."
    if not args.sparse[layer]:
        return parts.gated_mlp(args, LayerWeights(weights, prefix))
    routing = Routing(args.num_experts_per_tok, is_renormalised=args.norm_topk_prob)
    sizes = (args.num_experts, args.hidden_size, args.moe_intermediate_size)
    return mixture(weights, f"{prefix}mlp.", HF_NAMES, sizes, routing)
