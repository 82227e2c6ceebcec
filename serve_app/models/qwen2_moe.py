"""Qwen2-MoE (Qwen1.5-MoE too): Qwen2's attention with biases, experts, and one that all tokens share behind a gate."""

from dataclasses import dataclass
from typing import Any, ClassVar

from serve_app.layers.decoder import Decoder, PreNormBlock, Sublayer
from serve_app.layers.linear import Linear
from serve_app.layers.mlp import GatedMLP
from serve_app.layers.moe import SharedExpertMLP
from serve_app.layers.step import AngleTable, Routing
from serve_app.models import decoder_parts as parts
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.models.decoder_args import DecoderArgs, check_rotary, common_from_gguf, common_from_hf
from serve_app.models.gguf_form import GgufForm
from serve_app.models.layer_weights import LayerWeights
from serve_app.models.mixture_parts import HF_NAMES, expert_counts, mixture, sparse_layers
from serve_app.models.rope_config import rope_from_gguf, rope_from_hf
from serve_app.models.window_config import windows_from_hf
from serve_app.quant.weight import DenseWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2MoeArgs(DecoderArgs):
    """intermediate_size: of the layers that are no mixtures; sparse: which layers are. qkv_bias: None = as the file's
    tensors show."""

    GGUF: ClassVar[GgufForm] = GgufForm(
        "qwen2moe",
        {
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
            "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        },
    )

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    sparse: tuple[bool, ...]
    qkv_bias: bool | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "Qwen2MoeArgs":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "silu", ("silu",))
        common = common_from_hf(reader)
        num_experts, top_k = expert_counts(reader, "num_experts", "num_experts_per_tok")
        num_windows = reader.count("max_window_layers", 28, least=0) if reader.flag("use_sliding_window", False) else 0

        def is_sliding(layer: int) -> bool:
            # As transformers has it: every second layer of the first ones.
            return layer < num_windows and layer % 2 == 0

        args = cls(
            **common,
            rope=rope_from_hf(reader, common["head_dim"]),
            windows=windows_from_hf(reader, common["n_layers"], is_sliding) if num_windows else (),
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=reader.count("moe_intermediate_size"),
            shared_expert_intermediate_size=reader.count("shared_expert_intermediate_size"),
            norm_topk_prob=reader.flag("norm_topk_prob", False),
            sparse=sparse_layers(reader, common["n_layers"]),
            qkv_bias=reader.flag("qkv_bias", True),
        )
        check_rotary(args, reader, "head_dim")
        return args

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> "Qwen2MoeArgs":
        """See ModelArgs. The format has no keys for norm_topk_prob and for layers that are no mixtures: factors stay as
        they are and all layers are mixtures, as llama.cpp has it."""
        reader = ConfigReader(metadata, file)
        common = common_from_gguf(reader, cls.GGUF)
        num_experts, top_k = expert_counts(reader, cls.GGUF.key("num_experts"), cls.GGUF.key("num_experts_per_tok"))
        inner, inner_key = common["intermediate_size"], cls.GGUF.key("moe_intermediate_size")
        args = cls(
            **common,
            rope=rope_from_gguf(reader, cls.GGUF),
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=reader.count(inner_key, max(1, inner // top_k)),
            shared_expert_intermediate_size=reader.count(cls.GGUF.key("shared_expert_intermediate_size"), inner),
            norm_topk_prob=False,
            sparse=(True,) * common["n_layers"],
        )
        check_rotary(args, reader, cls.GGUF.key("head_dim"))
        return args


class Qwen2MoeForCausalLM(Decoder):
    """See CausalLM."""

    def __init__(self, args: Qwen2MoeArgs, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).rms_norm("model.norm", args.hidden_size, args.norm_eps)
        embedding, rotary = parts.embedding(args, weights), parts.rotary(args, weights, norm.device)
        blocks = [_block(args, weights, layer, rotary) for layer in range(args.n_layers)]
        super().__init__(embedding, blocks, norm, parts.head(args, weights, embedding))


def _block(args: Qwen2MoeArgs, weights: WeightSource, layer: int, rotary: AngleTable) -> PreNormBlock:
    own, eps = LayerWeights(weights, f"model.layers.{layer}."), args.norm_eps
    return PreNormBlock(
        own.rms_norm("input_layernorm", args.hidden_size, eps),
        parts.attention(args, own, rotary, parts.attention_shape(args, layer), qkv_bias=args.qkv_bias),
        own.rms_norm("post_attention_layernorm", args.hidden_size, eps),
        _mlp(args, weights, layer),
    )


def _mlp(args: Qwen2MoeArgs, weights: WeightSource, layer: int) -> Sublayer:
    prefix, hidden, shared = f"model.layers.{layer}.", args.hidden_size, args.shared_expert_intermediate_size
    own = LayerWeights(weights, prefix)
    if not args.sparse[layer]:
        return parts.gated_mlp(args, own)
    routing = Routing(args.num_experts_per_tok, is_renormalised=args.norm_topk_prob)
    sizes = (args.num_experts, hidden, args.moe_intermediate_size)
    gate_up = ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"]
    shared_mlp = GatedMLP(
        own.linear(gate_up, [shared] * 2, hidden, False),
        own.linear(["mlp.shared_expert.down_proj"], [hidden], shared, False),
    )
    shared_gate = Linear(DenseWeight(weights.tensor(f"{prefix}mlp.shared_expert_gate.weight", (1, hidden))))
    return SharedExpertMLP(mixture(weights, f"{prefix}mlp.", HF_NAMES, sizes, routing), shared_mlp, shared_gate)
