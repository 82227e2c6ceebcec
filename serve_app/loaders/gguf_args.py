"""A GGUF's hyper-parameters out of a model's arguments, and the arguments that none can say."""

from typing import Any, cast

from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.args_match import differing_argument
from serve_app.models.decoder_args import DecoderArgs
from serve_app.models.rope_config import rope_for_gguf


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
    name = differing_argument(args, read)
    if name is not None:
        raise LaunchError(
            f"{file}: {name} is {getattr(args, name)!r}, which a GGUF of the architecture {form.architecture} cannot "
            f"say: it would be read as {getattr(read, name)!r}."
        )
    return values
