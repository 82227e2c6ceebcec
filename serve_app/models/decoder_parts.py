"""The parts that families build alike: rotary tables, embedding and head, attention, MLP."""

import torch

from serve_app.attention.backend import AttentionShape
from serve_app.layers.attention import Attention
from serve_app.layers.embedding import Embedding, OutputHead
from serve_app.layers.linear import Linear
from serve_app.layers.mlp import GatedMLP
from serve_app.layers.rope_scaling import RopeScaling, dynamic_base, inverse_frequencies
from serve_app.layers.rotary import PlacedRotary, Rotary
from serve_app.layers.step import Activation, AngleTable, NormWeights
from serve_app.models.base import WeightSource
from serve_app.models.decoder_args import DecoderArgs
from serve_app.models.layer_weights import LayerWeights
from serve_app.models.rope_config import RopeConfig

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def embedding(args: DecoderArgs, weights: WeightSource, factor: float = 1.0) -> Embedding:
    """`model.embed_tokens`; factor: what its rows are multiplied with."""
    return Embedding(weights.weight(["model.embed_tokens.weight"], [args.vocab_size], args.hidden_size), factor)


def head(args: DecoderArgs, weights: WeightSource, embedding: Embedding) -> OutputHead:
    """`lm_head`, or the embedding where they are tied. A head with a bias has one as the file's tensors show."""
    is_tied = args.tie_word_embeddings
    if is_tied is None:
        is_tied = not weights.has("lm_head.weight")
    bias = weights.tensor("lm_head.bias", (args.vocab_size,)) if weights.has("lm_head.bias") else None
    if is_tied:
        return OutputHead(embedding.weight, bias)
    return OutputHead(weights.weight(["lm_head.weight"], [args.vocab_size], args.hidden_size), bias)


def rotary(
    args: DecoderArgs,
    weights: WeightSource,
    device: torch.device,
    rope: RopeConfig | None = None,
    *,
    magnitudes: tuple[float, float] | None = None,
) -> Rotary | PlacedRotary:
    """The angles of args.rope, or of another rope of the same width. GGUF's divisors are applied where it has them.

    magnitudes: of longrope's short and long set, None = the scaling's for both.
    """
    rope = args.rope if rope is None else rope
    scaling, half = rope.scaling, args.rotary_dim // 2
    frequencies = inverse_frequencies(args.rotary_dim, rope.theta, scaling).to(device)
    longest, original = args.max_position_embeddings, scaling.original_max_position_embeddings
    if scaling.kind == "dynamic" and longest > original:

        def by_length(length: int) -> torch.Tensor:
            base = dynamic_base(rope.theta, args.rotary_dim, scaling, length)
            return inverse_frequencies(args.rotary_dim, base, RopeScaling())

        return PlacedRotary(by_length, original, longest, device)
    if scaling.kind == "longrope":
        short, long = (
            frequencies / (torch.tensor(stated) if stated else weights.tensor(name, (half,))).to(device)
            for name, stated in (
                ("rope_factors_short.weight", scaling.short_factor),
                ("rope_factors_long.weight", scaling.long_factor),
            )
        )
        of_short, of_long = magnitudes or (scaling.magnitude, scaling.magnitude)
        table = Rotary(short, min(original, longest), of_short)
        return table if longest <= original else Rotary(long, longest, of_long, short=table)
    if weights.has("rope_freqs.weight"):
        frequencies = frequencies / weights.tensor("rope_freqs.weight", (half,))
    return Rotary(frequencies, longest, scaling.magnitude)


def attention_shape(args: DecoderArgs, layer: int, scale: float | None = None, softcap: float = 0.0) -> AttentionShape:
    """scale: of the scores, None = one over the root of the head's size."""
    scale = args.head_dim**-0.5 if scale is None else scale
    return AttentionShape(layer, args.n_heads, args.n_kv_heads, args.head_dim, scale, softcap, args.window(layer))


def head_norms(args: DecoderArgs, weights: LayerWeights, offset: float = 0.0) -> tuple[NormWeights, NormWeights]:
    """`self_attn.{q,k}_norm`, over each head of queries and keys. offset: what is added to norm weights."""
    of_head = (args.head_dim, args.norm_eps, offset)
    return weights.rms_weights("self_attn.q_norm", *of_head), weights.rms_weights("self_attn.k_norm", *of_head)


def attention(
    args: DecoderArgs,
    weights: LayerWeights,
    rotary: AngleTable,
    shape: AttentionShape,
    *,
    qkv_bias: bool | None = None,
    out_bias: bool | None = None,
    head_norms: tuple[NormWeights, NormWeights] | None = None,
) -> Attention:
    """Over `self_attn.{q,k,v,o}_proj`. Biases: None = as the file's tensors show."""
    return Attention(
        weights.linear(QKV, args.qkv_sizes, args.hidden_size, qkv_bias),
        weights.linear(["self_attn.o_proj"], [args.hidden_size], args.n_heads * args.head_dim, out_bias),
        rotary,
        shape,
        head_norms,
    )


def gated_mlp(
    args: DecoderArgs, weights: LayerWeights, activation: Activation = "silu", *, has_bias: bool | None = None
) -> GatedMLP:
    """Over `mlp.{gate,up,down}_proj`. Biases: None = as the file's tensors show."""
    names, sizes = ["mlp.gate_proj", "mlp.up_proj"], [args.intermediate_size] * 2
    gate_up = weights.linear(names, sizes, args.hidden_size, has_bias)
    return GatedMLP(gate_up, down(args, weights, has_bias=has_bias), activation)


def down(args: DecoderArgs, weights: LayerWeights, *, has_bias: bool | None = None) -> Linear:
    """`mlp.down_proj`. Bias: None = as the file's tensors show."""
    return weights.linear(["mlp.down_proj"], [args.hidden_size], args.intermediate_size, has_bias)
