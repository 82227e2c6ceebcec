"""The rotary settings of a checkpoint, in the forms that configurations have had."""

from dataclasses import dataclass, field

from serve_app.layers.rotary import RopeScaling
from serve_app.models.config_reader import ConfigReader


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """theta: the base of the frequencies. dim: rotated elements of a head, None = all."""

    theta: float = 10000.0
    dim: int | None = None
    scaling: RopeScaling = field(default_factory=RopeScaling)


def rope_from_hf(config: ConfigReader, head_dim: int) -> RopeConfig:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    nested = config.section("rope_parameters") or config.section("rope_scaling") or ConfigReader({}, config.file)
    outer = config.get("rope_theta") is not None and nested.get("rope_theta") is None
    theta = (config if outer else nested).number("rope_theta", 10000.0)
    share = (config if nested.get("partial_rotary_factor") is None else nested).number("partial_rotary_factor", 1.0)
    key = "rope_type" if nested.get("rope_type") is not None else "type"
    kind = nested.get(key) or "default"
    original = config.count("max_position_embeddings")
    if kind == "default":
        scaling = RopeScaling()
    elif kind == "linear":
        scaling = RopeScaling("linear", nested.number("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            nested.number("factor"),
            nested.number("low_freq_factor"),
            nested.number("high_freq_factor"),
            nested.count("original_max_position_embeddings", original),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise nested.fail("high_freq_factor", "is not above low_freq_factor")
    else:
        raise nested.fail(key, f"is {kind!r}; supported are default, linear and llama3")
    return RopeConfig(theta, None if share == 1.0 else int(head_dim * share), scaling)


def rope_from_gguf(config: ConfigReader, prefix: str) -> RopeConfig:
    """From the keys `<prefix>.rope.*`. Llama 3's scaling is a tensor of divisors in these files, not a key."""
    key = f"{prefix}.rope.scaling.type"
    kind = config.get(key) or "none"
    factor_key = f"{prefix}.rope.scaling.factor"
    if kind == "linear":
        scaling = RopeScaling("linear", config.number(factor_key, 1.0))
    elif kind == "none":
        old = f"{prefix}.rope.scale_linear"
        scaling = RopeScaling("linear", config.number(old)) if config.get(old) else RopeScaling()
    else:
        raise config.fail(key, f"is {kind!r}; supported are none and linear")
    dim_key = f"{prefix}.rope.dimension_count"
    dim = config.count(dim_key) if config.get(dim_key) is not None else None
    return RopeConfig(config.number(f"{prefix}.rope.freq_base", 10000.0), dim, scaling)
