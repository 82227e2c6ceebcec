"""What becomes of a model's tensors where they keep their names: quantised at load, into a folder, GGUF to GGUF."""

from collections.abc import Sequence
from typing import Any

from serve_app.loaders.checkpoint import StoredTensor
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.name_map import gguf_name
from serve_app.loaders.opening import stated_args
from serve_app.loaders.quantized import Source
from serve_app.models.decoder_args import DecoderArgs
from serve_app.quant.mix import ModelFacts


def sources_as_stored(files: ModelFiles, stored: Sequence[StoredTensor]) -> tuple[list[Source], ModelFacts]:
    """For plan_steps. A GGUF's tensors have its names, a folder's are known to the recipe by those."""
    names = {tensor.name for tensor in stored}
    if files.gguf_metadata is not None:
        facts = gguf_facts(files.gguf_metadata, "output.weight" in names)
        return [Source.of(tensor, tensor.name) for tensor in stored], facts
    _, args = stated_args(files)
    assert isinstance(args, DecoderArgs)
    facts = folder_facts(args, "lm_head.weight" in names)
    return [Source.of(tensor, gguf_name(tensor.name, args.GGUF.architecture)) for tensor in stored], facts


def folder_facts(args: DecoderArgs, has_head: bool) -> ModelFacts:
    """What the choice of types looks at, out of a model's arguments."""
    return ModelFacts(
        args.GGUF.architecture,
        args.n_layers,
        args.n_heads,
        args.n_kv_heads,
        getattr(args, "num_local_experts", 0) or getattr(args, "num_experts", 0),
        not has_head or bool(args.tie_word_embeddings),
    )


def gguf_facts(metadata: dict[str, Any], has_head: bool) -> ModelFacts:
    """What the choice of types looks at, out of a GGUF's metadata."""
    architecture = str(metadata.get("general.architecture", ""))

    def number(key: str, default: int) -> int:
        value = metadata.get(f"{architecture}.{key}", default)
        return value if type(value) is int else default

    heads = number("attention.head_count", 1)
    kv_heads = number("attention.head_count_kv", heads)
    return ModelFacts(
        architecture, number("block_count", 1), heads, kv_heads, number("expert_count", 0), is_tied=not has_head
    )
