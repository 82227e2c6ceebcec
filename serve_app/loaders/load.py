"""From files to a model that is ready to run."""

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from kernels.cpu import weight_memory
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.fingerprint import fingerprint
from serve_app.loaders.isq import IsqReport, prepare
from serve_app.loaders.isq_importance import Calibrate
from serve_app.loaders.isq_progress import LoadProgress
from serve_app.loaders.kv_scales import KvScales, read_kv_scales
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.near_families import unused_tensors
from serve_app.loaders.number_formats import compute_dtype, kv_dtype
from serve_app.loaders.opening import find_args, open_checkpoint
from serve_app.loaders.weight_source import CheckpointSource
from serve_app.models.base import CausalLM, ModelArgs
from serve_app.options import DType, KvDType

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights.

    fingerprint: 16 bytes, equal where keys and values may be shared. kv_dtype: for the KV pool; kv_scales: those of the
    files, where it is e4m3 and they have some. isq: what was quantised in situ, if anything was.
    """

    model: CausalLM
    args: ModelArgs
    fingerprint: bytes
    compute_dtype: torch.dtype
    kv_dtype: torch.dtype
    kv_scales: KvScales | None = None
    isq: IsqReport | None = None


def load_model(
    files: ModelFiles,
    *,
    dtype: DType,
    device: str,
    kv: KvDType = "auto",
    is_exact: bool = False,
    progress: LoadProgress | None = None,
    calibrate: Calibrate | None = None,
) -> LoadedModel:
    """Builds the model over its mapped files; weights stay in the files where their form allows it.

    dtype, kv, is_exact: see loaders.number_formats. files.isq: what the weights become on the way; calibrate: what
    computes an importance matrix of a text for that. progress: told of what is read, or else the log where weights are
    quantised; what it raises ends the loading. Resident memory peaks at the files' size plus the process; with isq,
    anonymous memory at the size of the result plus a piece for each thread (HQQ: a tensor). Raises ModelFileError
    naming the file and the tensor or key that is missing, misshapen or not supported.
    """
    started = time.monotonic()
    family, args = find_args(files)
    opened = open_checkpoint(files)
    isq = prepare(files, opened, progress, calibrate)
    checkpoint = isq.checkpoint
    chosen = compute_dtype(dtype, checkpoint, torch.device(device))
    source = CheckpointSource(checkpoint, chosen, torch.device(device), is_exact=is_exact, progress=isq.progress)
    try:
        with isq.running():
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
    if isq.identity is not None:
        facts["isq"] = isq.identity
    identity = fingerprint(facts, opened.stored())
    return LoadedModel(model, args, identity, chosen, kept, scales, isq.report(files.model_name, started))


def _report_unused(checkpoint: Checkpoint, source: CheckpointSource) -> None:
    """A tensor that nothing reads may mean that the configuration does not fit the weights: worth a line in the log."""
    unused = unused_tensors(checkpoint, source.unused())
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        logger.warning("%s: tensors that the model does not use: %s%s", checkpoint.label, ", ".join(unused[:3]), more)
