"""The rotary settings of a checkpoint, in the forms that configurations have had."""

from dataclasses import dataclass, field, replace
from typing import Any

from serve_app.layers.rope_scaling import RopeScaling, longrope_magnitude, yarn_magnitude
from serve_app.models.config_reader import ConfigReader
from serve_app.models.gguf_form import GgufForm


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """theta: the base of the frequencies. dim: rotated elements of a head, None = all."""

    theta: float = 10000.0
    dim: int | None = None
    scaling: RopeScaling = field(default_factory=RopeScaling)


def rope_from_hf(config: ConfigReader, head_dim: int, *, share: float = 1.0) -> RopeConfig:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    share: of a head that is rotated where the file does not say it.
    """
    nested = config.section("rope_parameters") or config.section("rope_scaling") or ConfigReader({}, config.file)
    outer = config.get("rope_theta") is not None and nested.get("rope_theta") is None
    theta = (config if outer else nested).number("rope_theta", 10000.0)
    share = (config if nested.get("partial_rotary_factor") is None else nested).number("partial_rotary_factor", share)
    return RopeConfig(theta, None if share == 1.0 else int(head_dim * share), scaling_from_hf(config, nested))


def rope_for_hf(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` that rope_from_hf reads again; longrope's divisors are left to the caller."""
    scaling = rope.scaling
    values: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": rope.theta}
    if rope.dim not in (None, head_dim):
        values["partial_rotary_factor"] = (rope.dim + 0.5) / head_dim  # rounded down
    if scaling.kind in ("linear", "yarn"):
        values["factor"] = scaling.factor
    if scaling.kind in ("yarn", "longrope"):
        values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        values["attention_factor"] = scaling.magnitude
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncates}
    return values


def scaling_from_hf(config: ConfigReader, nested: ConfigReader) -> RopeScaling:
    """The scaling that a section of the configuration describes."""
    key = "rope_type" if nested.get("rope_type") is not None else "type"
    kind = nested.get(key) or "default"
    longest = config.count("max_position_embeddings")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", nested.number("factor"))
    if kind == "dynamic":
        return RopeScaling("dynamic", nested.number("factor"), original_max_position_embeddings=longest)
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            nested.number("factor"),
            nested.number("low_freq_factor"),
            nested.number("high_freq_factor"),
            nested.count("original_max_position_embeddings", longest),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise nested.fail("high_freq_factor", "is not above low_freq_factor")
        return scaling
    if kind in ("longrope", "su"):
        return _longrope(config, nested)
    if kind == "yarn":
        return _yarn(nested, longest)
    raise nested.fail(key, f"is {kind!r}; supported are default, linear, dynamic, llama3, yarn and longrope")


def _yarn(nested: ConfigReader, longest: int) -> RopeScaling:
    original = nested.count("original_max_position_embeddings", longest)
    factor = nested.number("factor", longest / original)
    weights = [nested.number_or_none(key) for key in ("mscale", "mscale_all_dim")]
    magnitude = yarn_magnitude(factor)
    if all(weights):
        magnitude = yarn_magnitude(factor, weights[0]) / yarn_magnitude(factor, weights[1])
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=original,
        magnitude=nested.number("attention_factor", magnitude),
        beta_fast=nested.number("beta_fast", 32.0),
        beta_slow=nested.number("beta_slow", 1.0),
        truncates=nested.flag("truncate", True),
    )


def _longrope(config: ConfigReader, nested: ConfigReader) -> RopeScaling:
    longest = config.count("max_position_embeddings")
    outer = nested.get("original_max_position_embeddings") is None
    original = (config if outer else nested).count("original_max_position_embeddings", longest)
    factor = nested.number("factor", longest / original)
    return RopeScaling(
        "longrope",
        factor,
        original_max_position_embeddings=original,
        magnitude=nested.number("attention_factor", longrope_magnitude(factor, original)),
        short_factor=nested.numbers("short_factor"),
        long_factor=nested.numbers("long_factor"),
    )


def rope_from_gguf(config: ConfigReader, form: GgufForm, *, has_longrope: bool = False) -> RopeConfig:
    """From the keys `rope.*`. Llama 3's and longrope's divisors are tensors in these files, not keys.

    has_longrope: an original length below the context length stands for longrope (Phi-3).
    """
    keys = _RopeKeys(form.architecture)
    kind = config.get(keys.kind) or "none"
    longest = config.count(form.key("max_position_embeddings"))
    original = config.count(keys.original, longest)
    if has_longrope and config.get(keys.magnitude) is not None and kind in ("none", "longrope"):
        magnitude = config.number(keys.magnitude)
        scaling = RopeScaling("longrope", original_max_position_embeddings=original, magnitude=magnitude)
    elif kind == "linear":
        scaling = RopeScaling("linear", config.number(keys.factor, 1.0))
    elif kind == "yarn":
        factor = config.number(keys.factor)
        scaling = RopeScaling(
            "yarn",
            factor,
            original_max_position_embeddings=original,
            magnitude=yarn_magnitude(factor) * config.number(keys.magnitude, 1.0),
            beta_fast=config.number(keys.beta_fast, 32.0),
            beta_slow=config.number(keys.beta_slow, 1.0),
        )
    elif kind == "none":
        old = f"{form.architecture}.rope.scale_linear"
        scaling = RopeScaling("linear", config.number(old)) if config.get(old) else RopeScaling()
    else:
        raise config.fail(keys.kind, f"is {kind!r}; supported are none, linear and yarn")
    dim = config.count(keys.dim) if config.get(keys.dim) is not None else None
    return RopeConfig(config.number(keys.theta, 10000.0), dim, scaling)


def rope_for_gguf(rope: RopeConfig, rotary_dim: int, form: GgufForm) -> dict[str, str | int | float]:
    """What rope_from_gguf reads. Nothing of Llama 3's scaling, and of longrope's the magnitude only."""
    keys, scaling = _RopeKeys(form.architecture), rope.scaling
    values: dict[str, str | int | float] = {keys.theta: rope.theta, keys.dim: rotary_dim}
    if scaling.kind in ("linear", "yarn"):
        values |= {keys.kind: scaling.kind, keys.factor: scaling.factor}
    if scaling.kind == "yarn":
        values |= {keys.beta_fast: scaling.beta_fast, keys.beta_slow: scaling.beta_slow}
        values[keys.magnitude] = scaling.magnitude / yarn_magnitude(scaling.factor)
    if scaling.kind == "longrope":
        values |= {keys.kind: scaling.kind, keys.magnitude: scaling.magnitude}
    if scaling.kind in ("yarn", "longrope"):
        values[keys.original] = scaling.original_max_position_embeddings
    return values


class _RopeKeys:
    """GGUF's keys of a RopeConfig."""

    def __init__(self, architecture: str) -> None:
        prefix = f"{architecture}.rope"
        self.theta, self.dim = f"{prefix}.freq_base", f"{prefix}.dimension_count"
        self.kind, self.factor = f"{prefix}.scaling.type", f"{prefix}.scaling.factor"
        self.original = f"{prefix}.scaling.original_context_length"
        self.magnitude = f"{prefix}.scaling.attn_factor"
        self.beta_fast, self.beta_slow = (f"{prefix}.scaling.yarn_beta_{speed}" for speed in ("fast", "slow"))


def unscaled(rope: RopeConfig, theta: float) -> RopeConfig:
    """The same without scaling, over another base."""
    return replace(rope, theta=theta, scaling=RopeScaling())
