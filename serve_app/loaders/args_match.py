"""Whether two arguments of one family mean the same model, whatever format each was read from."""

import math
from dataclasses import fields, replace
from typing import Any

from serve_app.layers.rope_scaling import RopeScaling
from serve_app.models.decoder_args import DecoderArgs
from serve_app.models.rope_config import RopeConfig

# What the tensors show: biases, the head, and norms (Gemma's are shifted as they are written).
_IN_TENSORS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "tie_word_embeddings", "norm_offset")


def differing_argument(one: DecoderArgs, other: DecoderArgs) -> str | None:
    """The name of the first argument that makes a difference; None where there is none. Divisors of frequencies, Llama
    3's and longrope's, are not looked at: GGUF has tensors for them."""
    for field in fields(one):
        if field.name in _IN_TENSORS:
            continue
        if not _is_same(_normal(one, field.name), _normal(other, field.name)):
            return field.name
    return None


def _normal(args: DecoderArgs, name: str) -> Any:
    """The argument, with one form for what means the same."""
    value = getattr(args, name)
    if isinstance(value, RopeConfig):
        scaling, dim = value.scaling, args.head_dim if value.dim is None else value.dim
        if scaling.kind in ("llama3", "dynamic"):  # tensors of their own; nothing within the context
            scaling = RopeScaling()
        elif scaling.kind == "longrope":  # the factor has gone into the magnitude
            scaling = replace(scaling, factor=1.0, short_factor=(), long_factor=())
        return [value.theta, dim, *(getattr(scaling, field.name) for field in fields(scaling))]
    if name == "windows":  # one as long as the context hides nothing
        return [0 if window >= args.max_position_embeddings else window for window in value or (0,) * args.n_layers]
    return value


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
