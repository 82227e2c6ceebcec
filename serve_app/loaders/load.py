"""From files to a model that is ready to run."""

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch

from kernels.cpu import weight_memory
from serve_app.errors import ModelFileError
from serve_app.ggml_file import open_ggml
from serve_app.gguf_file import open_gguf
from serve_app.layers.rope_scaling import RopeScaling
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.fingerprint import fingerprint
from serve_app.loaders.gguf import GgufCheckpoint
from serve_app.loaders.isq_progress import LoadProgress
from serve_app.loaders.kv_scales import KvScales, read_kv_scales
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.near_families import near_families, suggestion, unused_tensors
from serve_app.loaders.number_formats import compute_dtype, kv_dtype
from serve_app.loaders.safetensors import SafetensorsCheckpoint
from serve_app.loaders.weight_source import CheckpointSource
from serve_app.models.base import CausalLM, ModelArgs
from serve_app.models.decoder_args import DecoderArgs
from serve_app.models.registry import Family, UnknownArchitecture, find_family, gguf_architecture
from serve_app.options import DType, KvDType

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights.

    fingerprint: 16 bytes, equal where keys and values may be shared. kv_dtype: for the KV pool; kv_scales: those of the
    files, where it is e4m3 and they have some.
    """

    model: CausalLM
    args: ModelArgs
    fingerprint: bytes
    compute_dtype: torch.dtype
    kv_dtype: torch.dtype
    kv_scales: KvScales | None = None


def load_model(
    files: ModelFiles,
    *,
    dtype: DType,
    device: str,
    kv: KvDType = "auto",
    is_exact: bool = False,
    progress: LoadProgress | None = None,
) -> LoadedModel:
    """Builds the model over its mapped files; weights stay in the files where their form allows it.

    dtype, kv, is_exact: see loaders.number_formats. progress: told of each tensor that is read; what it
    raises ends the loading. Resident memory peaks at the files' size plus the process. Raises ModelFileError naming the
    file and the tensor or key that is missing, misshapen or not supported.
    """
    family, args = find_args(files)
    checkpoint = open_checkpoint(files)
    chosen = compute_dtype(dtype, checkpoint, torch.device(device))
    source = CheckpointSource(
        checkpoint,
        chosen,
        torch.device(device),
        is_exact=is_exact,
        progress=None if progress is None else progress.advance,
    )
    try:
        model = family.build(args, source)
    finally:
        weight_memory.end()
    kept = kv_dtype(kv, dtype, checkpoint, torch.device(device), is_exact=is_exact)
    scales = read_kv_scales(checkpoint, source, args) if kept == torch.float8_e4m3fn else None
    _report_unused(checkpoint, source)
    facts = {
        "architecture": files.architecture,
        "args": asdict(cast(Any, args)),
        "dtypes": f"{chosen} {kept}",
        "is_exact": is_exact,
    }
    return LoadedModel(model, args, fingerprint(facts, checkpoint.stored()), chosen, kept, scales)


def find_args(files: ModelFiles) -> tuple[Family, ModelArgs]:
    """The model's family and its arguments; ModelFileError for a configuration that does not do.

    The arguments have the context that is served: with it go the size of rotary tables and, where it stays within the
    original length, the only set of longrope that is needed.
    """
    family, args = stated_args(files)
    longest = args.max_position_embeddings
    scaling = args.rope.scaling if isinstance(args, DecoderArgs) else RopeScaling()
    if scaling.kind == "dynamic":
        # The base grows with the text, so that it may be as much longer than the configuration says.
        longest = int(scaling.factor * scaling.original_max_position_embeddings)
    return family, replace(cast(Any, args), max_position_embeddings=min(longest, files.max_seq_len))


def stated_args(files: ModelFiles) -> tuple[Family, ModelArgs]:
    """The model's family, and its arguments as the files have them; ModelFileError as for find_args."""
    try:
        family = find_family(_architecture(files), files.config_file)
    except UnknownArchitecture as error:
        near = suggestion(near_families(files, open_checkpoint))
        raise UnknownArchitecture(f"{error}{near}") from None
    if files.gguf_metadata is not None:
        return family, family.args.from_gguf(files.gguf_metadata, files.config_file)
    return family, family.args.from_hf(files.config or {}, files.config_file)


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """The tensors of a model's files; ModelFileError for a bad file."""
    if files.kind == "plain":
        return SafetensorsCheckpoint(files.weight_files)
    # Never closed: the weights are views of its mapping, which ends with the last of them.
    file = open_ggml(files.weight_files[0]) if files.kind == "ggml" else open_gguf(files.weight_files, with_texts=False)
    return GgufCheckpoint(file, files.gguf_metadata)


def _architecture(files: ModelFiles) -> str:
    name = files.architecture if files.gguf_metadata is None else gguf_architecture(files.gguf_metadata)
    if not isinstance(name, str):
        key = "general.architecture" if files.kind == "gguf" else "architectures"
        raise ModelFileError(f"{files.config_file}: key {key!r} is missing or no text")
    return name


def _report_unused(checkpoint: Checkpoint, source: CheckpointSource) -> None:
    """A tensor that nothing reads may mean that the configuration does not fit the weights: worth a line in the log."""
    unused = unused_tensors(checkpoint, source.unused())
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        logger.warning("%s: tensors that the model does not use: %s%s", checkpoint.label, ", ".join(unused[:3]), more)
