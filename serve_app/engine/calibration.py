"""Importance matrices from a text: how strongly each column of each matrix is driven while the model reads it.

The figures are llama-imatrix's: chunks of 512 tokens, BOS in front of each, and for every matrix the squares of what it
is multiplied with, summed by column; a mixture's experts each have sums and a count of their own. Beyond that program
the head is covered too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu import weight_memory
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.torch_backend import TorchAttention
from serve_app.batch import ForwardBatch
from serve_app.engine.text_chunks import text_chunks
from serve_app.errors import LaunchError
from serve_app.kv_cache.kv_pool import KvPool
from serve_app.layers.calibration_step import CalibrationStep
from serve_app.loaders import isq_importance
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.named_source import NamedSource
from serve_app.loaders.opening import find_args, open_checkpoint
from serve_app.loaders.weight_source import CheckpointSource
from serve_app.models.base import CausalLM
from serve_app.quant.experts import Experts
from serve_app.quant.imatrix import Importance
from serve_app.quant.weight import Weight
from serve_app.text.tokenizer import open_tokenizer

_BLOCK_SIZE = 32
# How many of a chunk's widest activations are there at a time: gate, up, and their product twice.
_WIDE_ACTIVATIONS = 4


@dataclass(frozen=True, slots=True)
class Calibration:
    """importance: see quant.imatrix. counts: by the same names int64 [experts] (one for a plain matrix), the rows that
    each mean is of. num_chunks of chunk_tokens were read."""

    importance: Importance
    counts: dict[str, NDArray[np.int64]]
    num_chunks: int
    chunk_tokens: int


def calibrate(files: ModelFiles, text: str) -> Importance:
    """The importance matrix of a model for a text; see measure_inputs."""
    return measure_inputs(files, text).importance


def memory_bytes(files: ModelFiles) -> int:
    """About what measure_inputs takes at most: the weights as they are stored, keys and values of a chunk, its scores
    of one layer, and its widest activations. ModelFileError for a model that does not load."""
    _, args = find_args(files)
    stored = list(open_checkpoint(files).stored())
    length = isq_importance.chunk_tokens(files)
    pool = KvPool.bytes_per_block(_BLOCK_SIZE, args.n_layers, args.n_kv_heads, args.head_dim, torch.float32)
    # Without the head, which is not computed.
    widest = max((t.shape[-2] for t in stored if len(t.shape) > 1 and t.shape[-2] != args.vocab_size), default=0)
    numbers = 2 * args.n_heads * length**2 + _WIDE_ACTIVATIONS * length * widest
    return sum(t.data.size for t in stored) + _num_blocks(length) * pool + 4 * numbers


def measure_inputs(
    files: ModelFiles,
    text: str,
    *,
    chunk_tokens: int | None = None,
    max_chunks: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Runs the model over a text on the CPU, its inputs not rounded, on the threads that compute in this process.

    chunk_tokens: at most the model's context; None: 512, or the context where that is shorter. progress is called with
    the chunks done and all chunks. LaunchError where the text has no whole chunk or activations are not finite,
    ModelFileError for a model that does not load.
    """
    family, args = find_args(files)
    length = chunk_tokens or isq_importance.chunk_tokens(files)
    try:
        chunks = text_chunks(open_tokenizer(files.tokenizer_source), text, length, max_chunks)
    except ValueError as error:
        raise LaunchError(f"Calibration: {error}.") from None
    stored = CheckpointSource(open_checkpoint(files), torch.float32, torch.device("cpu"), is_exact=True)
    source = NamedSource(stored, args.GGUF.architecture)
    try:
        model = family.build(args, source)
    finally:
        weight_memory.end()
    sums = _Sums()
    shape = (_num_blocks(length), _BLOCK_SIZE, args.n_layers, args.n_kv_heads, args.head_dim)
    pool = KvPool.on_device("cpu", *shape, torch.float32)
    for done, chunk in enumerate(chunks):
        _read(model, DeviceBatch.of(_one_prompt(chunk), pool, torch.device("cpu")), sums)
        progress(done + 1, len(chunks))
    importance, counts = sums.by_name(source)
    for name, values in importance.items():
        if not np.isfinite(values).all():
            raise LaunchError(f"Calibration: what {name} is multiplied with is not finite.")
    return Calibration(importance, counts, len(chunks), length)


def _num_blocks(length: int) -> int:
    return -(-length // _BLOCK_SIZE)


def _read(model: CausalLM, batch: DeviceBatch, sums: "_Sums") -> None:
    with torch.no_grad():
        step = CalibrationStep(batch, TorchAttention(), sums.add)
        hidden = step.wanted(model.forward(step))
        # Only what goes into the head is wanted, not the logits: in a small model they are half of the work.
        step.computes = False
        model.logits(hidden, step)


class _Sums:
    """Squares of inputs, by matrix, summed over rows in float64."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Weight | Experts, Tensor, NDArray[np.int64]]] = {}

    def add(self, matrix: Weight | Experts, expert: int, x: Tensor) -> None:
        """See calibration_step.OnInput."""
        if id(matrix) not in self._found:
            experts = getattr(matrix, "num_experts", 1)
            sums = torch.zeros(experts, matrix.shape[1], dtype=torch.float64)
            self._found[id(matrix)] = matrix, sums, np.zeros(experts, np.int64)
        _, sums, counts = self._found[id(matrix)]
        sums[expert] += x.float().square().sum(0, dtype=torch.float64)
        counts[expert] += len(x)

    def by_name(self, source: NamedSource) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.int64]]]:
        """Means and counts by GGUF name. An expert that no token reached says nothing: its columns count alike."""
        means: dict[str, NDArray[np.float32]] = {}
        all_counts: dict[str, NDArray[np.int64]] = {}
        for matrix, sums, counts in self._found.values():
            seen = counts[:, None]
            mean = np.where(seen > 0, sums.numpy() / np.maximum(seen, 1), 1).astype(np.float32).reshape(-1)
            for name in source.names(matrix):
                means[name], all_counts[name] = mean, counts
        return means, all_counts


def _one_prompt(ids: list[int]) -> ForwardBatch:
    """A step of one prompt as a whole, in the pool's first blocks, the hidden states of all its tokens wanted."""
    count = len(ids)
    positions = np.arange(count, dtype=np.int64)
    return ForwardBatch(
        token_ids=np.array(ids, np.int64),
        positions=positions,
        slot_mapping=positions,
        block_tables=np.arange(_num_blocks(count), dtype=np.int32)[None],
        query_start=np.array([0, count], np.int32),
        context_lens=np.array([count], np.int32),
        logit_index=positions,
        sample_rows=np.zeros(0, np.int64),
        sample_positions=np.zeros(0, np.int64),
        max_query_len=count,
        max_context_len=count,
    )
