"""A config.json for a model that came as a GGUF."""

from dataclasses import fields
from typing import Any, cast

import torch

from kernels.reference.quant import dequantize
from serve_app.errors import ModelFileError
from serve_app.loaders.args_match import differing_argument
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.pages import as_tensor
from serve_app.models.decoder_args import HF_KEYS, DecoderArgs
from serve_app.models.registry import Family, hf_architecture
from serve_app.models.rope_config import rope_for_hf

# Flags that GGUF leaves to the tensors → a tensor that is there where they are set.
_BIASES = {
    "attention_bias": "model.layers.0.self_attn.q_proj.bias",
    "qkv_bias": "model.layers.0.self_attn.q_proj.bias",
    "use_bias": "model.layers.0.self_attn.q_proj.bias",
    "mlp_bias": "model.layers.0.mlp.up_proj.bias",
}
_KINDS = ("full_attention", "sliding_attention")


def hf_config(family: Family, args: DecoderArgs, checkpoint: Checkpoint) -> dict[str, Any]:
    """The values that the family reads args from again; ModelFileError naming an argument that does not come back."""
    architecture = hf_architecture(family)
    config: dict[str, Any] = {"architectures": [architecture], "model_type": args.GGUF.architecture}
    config |= {key: getattr(args, name) for name, key in HF_KEYS.items()} | {args.NORM_EPS: args.norm_eps}
    common = {field.name for field in fields(DecoderArgs)}
    own = {field.name for field in fields(args) if field.name not in common} | set(args.GGUF.keys)
    own -= {"norm_offset", "local_rope", "local_theta", "sparse"}
    config |= {name: getattr(args, name) for name in sorted(own)}
    config |= {flag: checkpoint.find(name) is not None for flag, name in _BIASES.items() if flag in own}
    config["tie_word_embeddings"] = checkpoint.find("lm_head.weight") is None
    config["sliding_window"] = args.sliding_window or None
    if args.windows:
        config["layer_types"] = [_KINDS[bool(window)] for window in args.windows]
    config["rope_parameters"] = _ropes(args, checkpoint)
    config = {key: value for key, value in config.items() if key == "sliding_window" or value not in (None, ())}
    read = cast(Any, family.args).from_hf(config, "config.json")
    name = differing_argument(args, read)
    if name is not None:
        raise ModelFileError(
            f"{checkpoint.label}: {name} is {getattr(args, name)!r}, which a config.json of {architecture} cannot say"
        )
    return config


def _ropes(args: DecoderArgs, checkpoint: Checkpoint) -> dict[str, Any]:
    rope = rope_for_hf(args.rope, args.head_dim)
    if args.rope.scaling.kind == "longrope":
        magnitude = args.rope.scaling.magnitude
        rope |= {f"{kind}_factor": _divisors(checkpoint, kind) for kind in ("short", "long")}
        rope |= {f"{kind}_mscale": magnitude for kind in ("short", "long")}
    local = getattr(args, "local_rope", None)
    return rope if local is None else dict(zip(_KINDS, (rope, rope_for_hf(local, args.head_dim)), strict=True))


def _divisors(checkpoint: Checkpoint, kind: str) -> list[float]:
    """longrope's, which GGUF has as a tensor."""
    name = f"rope_factors_{kind}.weight"
    stored = checkpoint.find(name)
    if stored is None:
        raise ModelFileError(f"{checkpoint.label}: tensor {name!r} is missing")
    values: torch.Tensor = dequantize(stored.form, as_tensor(stored.data).view(1, -1))
    return [float(value) for value in values.flatten()]
