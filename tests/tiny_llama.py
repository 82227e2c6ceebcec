"""Random Llama models with transformers as their oracle, and batches built by hand, for the tests of all compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from serve_app.batch import ForwardBatch
from serve_app.engine.forward import choose_forward
from serve_app.kv_cache.kv_pool import row_elements
from serve_app.layers.shape_probe import ShapeProbe
from serve_app.models.base import CausalLM
from serve_app.models.llama import LlamaArgs, LlamaForCausalLM
from serve_app.quant.experts import DenseExperts, Experts
from serve_app.quant.weight import DenseWeight, Weight

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


class DictSource:
    """A WeightSource over a state dict, in one compute dtype, on one device."""

    def __init__(
        self, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.tensors = tensors
        self.dtype = dtype
        self.device = device

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        assert self.tensors[name].shape == shape, name
        return self.tensors[name].float().to(self.device)

    def weight(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> Weight:
        for name, out in zip(names, out_features, strict=True):
            assert self.tensors[name].shape == (out, in_features), name
        return DenseWeight(torch.cat([self.tensors[n] for n in names]).to(self.device, self.dtype))

    def experts(self, name: str, num_experts: int, out_features: int, in_features: int) -> Experts:
        parts = [self.tensors[name.format(expert)] for expert in range(num_experts)]
        assert all(part.shape == (out_features, in_features) for part in parts), name
        return DenseExperts(torch.stack(parts).to(self.device, self.dtype))

    def has(self, name: str) -> bool:
        return name in self.tensors


def hf_llama(seed: int = 0, **changes: Any) -> transformers.LlamaForCausalLM:
    """A random transformers model in float32, its logits spread like a trained one's."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**(SMALL | changes), initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.3)
    return model


def our_llama(
    hf: transformers.LlamaForCausalLM, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LlamaForCausalLM:
    """The same weights in our model."""
    tensors = {k: v.detach() for k, v in hf.state_dict().items()}
    return LlamaForCausalLM(LlamaArgs.from_hf(hf.config.to_dict()), DictSource(tensors, dtype, device))


class TinyPool:
    """K and V tensors, as kv_cache.kv_pool.KvPool has them, filled with NaN: what was not written must not be read."""

    def __init__(
        self,
        args: Any,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_blocks, block_size, args.n_kv_heads, row_elements(args.head_dim, dtype))
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.groups = [0] * args.n_layers
        filler = 0xFF if dtype == torch.uint8 else torch.nan
        self.k = [torch.full(shape, filler, dtype=dtype, device=device) for _ in range(args.n_layers)]
        self.v = [torch.full(shape, filler, dtype=dtype, device=device) for _ in range(args.n_layers)]
        is_fp8 = dtype == torch.float8_e4m3fn
        self.k_scales = [torch.full((args.n_kv_heads,), 0.05, device=device) for _ in self.k] if is_fp8 else None
        self.v_scales = [torch.full((args.n_kv_heads,), 0.02, device=device) for _ in self.v] if is_fp8 else None


@dataclass
class Piece:
    """Tokens [start, stop) of a request in one step. ids: all its tokens, blocks: its block list."""

    ids: Sequence[int]
    start: int
    stop: int
    blocks: Sequence[int]


def make_batch(pool: Any, pieces: Sequence[Piece], rows: Sequence[int] | None = None) -> ForwardBatch:
    """One step of these pieces. rows given: the last token of each piece is sampled in its row; else every token's
    logits are wanted."""
    size = pool.block_size
    counts = np.array([p.stop - p.start for p in pieces])
    ends = counts.cumsum()
    tables = np.zeros((len(pieces), max(-(-p.stop // size) for p in pieces)), np.int32)
    for r, piece in enumerate(pieces):
        used = -(-piece.stop // size)
        tables[r, :used] = piece.blocks[:used]
    return ForwardBatch(
        token_ids=np.array([t for p in pieces for t in p.ids[p.start : p.stop]]),
        positions=np.concatenate([np.arange(p.start, p.stop) for p in pieces]),
        slot_mapping=np.array([p.blocks[i // size] * size + i % size for p in pieces for i in range(p.start, p.stop)]),
        block_tables=tables,
        query_start=np.concatenate([[0], ends]).astype(np.int32),
        context_lens=np.array([p.stop for p in pieces], np.int32),
        logit_index=np.arange(ends[-1]) if rows is None else ends - 1,
        sample_rows=np.array([] if rows is None else rows, np.int64),
        sample_positions=np.array([] if rows is None else [p.stop for p in pieces], np.int64),
        max_query_len=int(counts.max()),
        max_context_len=max(p.stop for p in pieces),
    )


def step_logits(
    model: CausalLM, pool: Any, pieces: Sequence[Piece], backend: str = "auto", *, is_exact: bool = True
) -> list[Tensor]:
    """Runs one step; the logits of every token, piece by piece. Rotary sets are those of each piece's whole text."""
    forward = choose_forward(model, pool, getattr(pool, "device", "cpu"), backend, is_exact=is_exact)
    batch = make_batch(pool, pieces)
    probe = ShapeProbe()
    model.forward(probe)
    for sets in [rotary.sets for rotary in probe.rotaries if rotary.sets.are_several]:
        taken = [sets.take(len(p.ids), len(p.ids), len(p.ids)) for p in pieces]
        counts = [p.stop - p.start for p in pieces]
        batch.positions += np.repeat([angles.first_row for angles in taken if angles], counts)
    logits = torch.as_tensor(forward(batch)).clone()
    return list(logits.split([p.stop - p.start for p in pieces]))


def full_logits(
    model: CausalLM,
    ids: Sequence[int],
    backend: str = "auto",
    block_size: int = 16,
    *,
    is_exact: bool = True,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Logits [len(ids), vocab] of one request computed in one step, its blocks in ascending order."""
    num_blocks = -(-len(ids) // block_size)
    pool = TinyPool(model.args, num_blocks, block_size, device=device)
    return step_logits(model, pool, [Piece(ids, 0, len(ids), range(num_blocks))], backend, is_exact=is_exact)[0]
