"""What Gemma 2 and 3 build alike: blocks between norms, and the scale of scores where GGUF has no key for it."""

from collections.abc import Mapping
from typing import Any

from serve_app.layers.attention import Attention
from serve_app.layers.decoder import SandwichBlock
from serve_app.models import decoder_parts as parts
from serve_app.models.decoder_args import DecoderArgs
from serve_app.models.layer_weights import LayerWeights


def score_divisor(common: Mapping[str, Any], layers_of_27b: int) -> float:
    """Scores are divided by its root: the head's size, but for the 27B model, known by its layers, the width over the
    heads. common: DecoderArgs' fields."""
    if common["n_layers"] == layers_of_27b:
        return float(common["hidden_size"] / common["n_heads"])
    return float(common["head_dim"])


def sandwich(args: DecoderArgs, weights: LayerWeights, attention: Attention, norm_offset: float) -> SandwichBlock:
    """A layer around its attention. norm_offset: what is added to norm weights."""
    like = (args.hidden_size, args.norm_eps, norm_offset)
    return SandwichBlock(
        weights.rms_norm("input_layernorm", *like),
        attention,
        weights.rms_norm("post_attention_layernorm", *like),
        weights.rms_norm("pre_feedforward_layernorm", *like),
        parts.gated_mlp(args, weights, "gelu_tanh"),
        weights.rms_norm("post_feedforward_layernorm", *like),
    )
