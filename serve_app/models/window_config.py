"""Which layers see a sliding window only, as configurations say it."""

from collections.abc import Callable

from serve_app.models.config_reader import ConfigReader
from serve_app.models.gguf_form import GgufForm

_KINDS = ("full_attention", "sliding_attention")


def windows_from_hf(
    reader: ConfigReader, n_layers: int, is_sliding: Callable[[int], bool], *, default: int = 0
) -> tuple[int, ...]:
    """DecoderArgs.windows: `sliding_window` in the layers that `layer_types` names; is_sliding where it is missing.

    default: the window of a file that is silent about it, 0 = none.
    """
    window = int(reader.number_or_none("sliding_window", default))
    if not window:
        return ()
    kinds = reader.get("layer_types")
    if kinds is None:
        return alternating(window, n_layers, is_sliding)
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in _KINDS for kind in kinds):
        raise reader.fail("layer_types", f"does not name one of {' and '.join(_KINDS)} for each of {n_layers} layers")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def upper_windows(reader: ConfigReader, n_layers: int) -> tuple[int, ...]:
    """DecoderArgs.windows of Qwen 2 and 3: with `use_sliding_window`, the layers from `max_window_layers` on."""
    if not reader.flag("use_sliding_window", False):
        return ()
    first = reader.count("max_window_layers", 28, least=0)
    return windows_from_hf(reader, n_layers, lambda layer: layer >= first)


def windows_from_gguf(
    reader: ConfigReader, form: GgufForm, n_layers: int, is_sliding: Callable[[int], bool], default: int = 0
) -> tuple[int, ...]:
    """DecoderArgs.windows from the form's key of `sliding_window`, 0 = none; default: where the key is missing."""
    window = reader.count(form.key("sliding_window"), default, least=0)
    return alternating(window, n_layers, is_sliding) if window else ()


def alternating(window: int, n_layers: int, is_sliding: Callable[[int], bool]) -> tuple[int, ...]:
    """The window in the layers of which is_sliding says so, 0 in the others."""
    return tuple(window if is_sliding(layer) else 0 for layer in range(n_layers))


def every_layer(layer: int) -> bool:
    """A window in all of them."""
    return True
