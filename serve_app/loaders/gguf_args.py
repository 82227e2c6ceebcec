"""A GGUF's hyper-parameters out of a model's arguments, and the arguments that none can say."""

import math
from dataclasses import fields, replace
from typing import Any, cast

from serve_app.errors import LaunchError, ModelFileError
from serve_app.layers.rope_scaling import RopeScaling
from serve_app.models.decoder_args import DecoderArgs
from serve_app.models.rope_config import RopeConfig, rope_for_gguf

# What the tensors show: biases, the head, and norms (Gemma's are shifted as they are written).
_IN_TENSORS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "tie_word_embeddings", "norm_offset")


def gguf_values(args: DecoderArgs, file: str) -> dict[str, Any]:
    """Key → value. LaunchError naming the argument of the file that the family's GGUF has no way to say.

    What counts is what the family reads out of these values again: the format has no key for some, and llama.cpp's own
    rule stands in for them.
    """
    form = args.GGUF
    values: dict[str, Any] = {"general.architecture": form.architecture}
    # 0 stands for what a model does not have.
    values |= {form.key(name): getattr(args, name) for name in form.names() if getattr(args, name)}
    values[f"{form.architecture}.attention.value_length"] = args.head_dim
    values |= rope_for_gguf(args.rope, args.rotary_dim, form)
    try:
        read = cast(Any, type(args)).from_gguf(values, file)
    except ModelFileError as error:
        raise LaunchError(f"{error}: the model cannot be written as .gguf.") from None
    for field in fields(args):
        stated, found = (_normal(model, field.name) for model in (args, read))
        if field.name not in _IN_TENSORS and not _is_same(stated, found):
            raise LaunchError(
                f"{file}: {field.name} is {getattr(args, field.name)!r}, which a GGUF of the architecture "
                f"{form.architecture} cannot say: it would be read as {getattr(read, field.name)!r}."
            )
    return values


def _normal(args: DecoderArgs, name: str) -> Any:
    """The argument, with one form for what means the same."""
    value = getattr(args, name)
    if isinstance(value, RopeConfig):
        scaling, dim = value.scaling, args.head_dim if value.dim is None else value.dim
        if scaling.kind in ("llama3", "dynamic"):  # tensors of their own; nothing within the context
            scaling = RopeScaling()
        if scaling.kind == "longrope":  # its divisors are tensors, the factor has gone into the magnitude
            scaling = replace(scaling, factor=1.0, short_factor=(), long_factor=())
        if scaling.kind == "linear":
            scaling = RopeScaling("linear", scaling.factor)
        flat = [value.theta, dim]
        return flat + [getattr(scaling, field.name) for field in fields(scaling)]
    if name == "windows":  # one as long as the context hides nothing
        return [0 if window >= args.max_position_embeddings else window for window in value or (0,) * args.n_layers]
    return value


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
