"""Phi-3 and 3.5, mini and medium: fused qkv and gate_up, longrope, a window where the configuration has one.

Which of longrope's two sets is used follows the context that the model is served with: the short one up to the original
length, the long one beyond it, for every request alike.
"""

from dataclasses import dataclass
from typing import Any

import torch

from serve_app.layers.attention import Attention
from serve_app.layers.decoder import Decoder, PreNormBlock
from serve_app.layers.mlp import GatedMLP
from serve_app.layers.rotary import Rotary, inverse_frequencies
from serve_app.layers.step import Rows, Step
from serve_app.models import decoder_parts as parts
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.models.decoder_args import DecoderArgs, check_rotary, common_from_gguf, common_from_hf
from serve_app.models.layer_weights import LayerWeights
from serve_app.models.rope_config import rope_from_gguf, rope_from_hf
from serve_app.models.window_config import every_layer, windows_from_gguf, windows_from_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class Phi3Args(DecoderArgs):
    """See DecoderArgs."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "Phi3Args":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "silu", ("silu",))
        common = common_from_hf(reader)
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
        common = common_from_gguf(reader, "phi3")
        args = cls(
            **common,
            rope=rope_from_gguf(reader, "phi3", has_longrope=True),
            windows=windows_from_gguf(reader, "phi3", common["n_layers"], every_layer),
        )
        check_rotary(args, reader, "phi3.attention.key_length")
        return args

    @property
    def is_long(self) -> bool:
        """Whether contexts go beyond the original length."""
        return self.max_position_embeddings > self.rope.scaling.original_max_position_embeddings


class Phi3ForCausalLM:
    """See CausalLM."""

    def __init__(self, args: Phi3Args, weights: WeightSource) -> None:
        """Takes every tensor it needs from weights; ModelFileError where one is missing or misshapen."""
        self.args = args
        norm = LayerWeights(weights).rms_norm("model.norm", args.hidden_size, args.norm_eps)
        is_longrope = args.rope.scaling.kind == "longrope"
        rotary = _long_rotary(args, weights, norm.device) if is_longrope else parts.rotary(args, weights, norm.device)
        embedding = parts.embedding(args, weights)
        blocks = [self._block(layer, weights, rotary) for layer in range(args.n_layers)]
        self._decoder = Decoder(embedding, blocks, norm, parts.head(args, weights, embedding))

    def _block(self, layer: int, weights: WeightSource, rotary: Rotary) -> PreNormBlock:
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

    def forward(self, step: Step) -> Rows:
        """See CausalLM."""
        return self._decoder.forward(step)

    def logits(self, hidden: Rows, step: Step) -> Rows:
        """See CausalLM."""
        return self._decoder.logits(hidden, step)


def _long_rotary(args: Phi3Args, weights: WeightSource, device: torch.device) -> Rotary:
    scaling = args.rope.scaling
    sets = {}
    for name, stated in (("short", scaling.short_factor), ("long", scaling.long_factor)):
        in_file = f"rope_factors_{name}.weight"
        sets[name] = torch.tensor(stated) if stated else weights.tensor(in_file, (args.rotary_dim // 2,))
    divisors = sets["long" if args.is_long else "short"].to(device)
    frequencies = inverse_frequencies(args.rotary_dim, args.rope.theta, scaling).to(device) / divisors
    return Rotary(frequencies, args.max_position_embeddings, scaling.magnitude)
