"""The scales that a checkpoint brings for a KV cache in e4m3."""

import math

import torch
from torch import Tensor

from serve_app.errors import ModelFileError
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.weight_source import CheckpointSource
from serve_app.models.base import ModelArgs

# As compressed-tensors and ModelOpt write them, of a layer's keys and of its values.
_NAMES = (("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale"))

KvScales = tuple[list[Tensor], list[Tensor]]


def read_kv_scales(checkpoint: Checkpoint, source: CheckpointSource, args: ModelArgs) -> KvScales | None:
    """By layer, what cached keys and values are multiplied with, float32 [n_kv_heads]; None where there are none.

    A checkpoint has one number for a layer, or one for each KV head. ModelFileError for scales that some layer lacks,
    or that are not positive.
    """
    for names in _NAMES:
        if checkpoint.find(f"model.layers.0.self_attn.{names[0]}") is not None:
            keys, values = (
                [_scale(checkpoint, source, f"model.layers.{i}.self_attn.{name}", args) for i in range(args.n_layers)]
                for name in names
            )
            return keys, values
    return None


def _scale(checkpoint: Checkpoint, source: CheckpointSource, name: str, args: ModelArgs) -> Tensor:
    stored = checkpoint.find(name)
    count = 1 if stored is None else math.prod(stored.shape)
    if stored is None or count not in (1, args.n_kv_heads):
        raise ModelFileError(
            f"{checkpoint.label}: tensor {name!r} is missing, or is neither one number nor one for each KV head"
        )
    scale = source.tensor(name, stored.shape).float().reshape(count)
    if not (scale.isfinite() & (scale > 0)).all():
        raise ModelFileError(f"{stored.file}: tensor {name!r} holds what is no positive number")
    return scale.expand(args.n_kv_heads).contiguous().to(torch.float32)
