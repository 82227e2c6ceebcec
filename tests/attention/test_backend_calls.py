"""What backends hand to libraries that are not here: each gets a stand-in that computes attention in plain torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llama import Piece, TinyPool, make_batch
from torch import Tensor

from kernels.reference.attention import paged_attention
from serve_app.attention.backend import AttentionBackend, AttentionShape
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.flash3_backend import ARGUMENTS, Flash3Attention
from serve_app.attention.flashinfer_backend import PLAN_ARGUMENTS, FlashinferAttention, block_lists
from serve_app.attention.slot_write import write_slots
from serve_app.attention.torch_backend import TorchAttention
from serve_app.attention.vllm_flash_backend import FLASH_2, FLASH_3, VllmFlashAttention
from serve_app.attention.vllm_flash_module import ModuleFlashAttention
from serve_app.batch import GroupTables


@dataclass
class Args:
    n_layers: int = 2
    n_kv_heads: int = 2
    head_dim: int = 16


def attend(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, starts: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    return paged_attention(q, k, v, tables, starts.tolist(), lengths.tolist(), **options).view(q.shape)


def window_of(left: int, right: int) -> int:
    """As flash-attention counts: keys to the left besides the query's own, -1 = all."""
    assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
    return left + 1


def flash_operator(table: str) -> Any:
    def call(values: dict[str, Any]) -> None:
        assert values["is_causal"] is True
        assert values["max_seqlen_q"] >= int(values["cu_seqlens_q"].diff().max())
        assert values["max_seqlen_k"] >= int(values["seqused_k"].max())
        out = attend(
            values["q"], values["k"], values["v"], values[table], values["cu_seqlens_q"], values["seqused_k"],
            scale=values["softmax_scale"], softcap=values["softcap"],
            window=window_of(values["window_size_left"], values["window_size_right"]),
        )  # fmt: skip
        values["out"].copy_(out)

    return call


def flash3_function(**values: Any) -> Tensor:
    assert set(values) == ARGUMENTS
    assert values["causal"]
    return attend(
        values["q"], values["k_cache"], values["v_cache"], values["page_table"], values["cu_seqlens_q"],
        values["cache_seqlens"], scale=values["softmax_scale"], softcap=values["softcap"],
        window=window_of(*values["window_size"]),
    )  # fmt: skip


def old_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float, block_table: Tensor,
) -> Tensor:  # fmt: skip
    assert cu_seqlens_k.dtype == torch.int32
    options = {"scale": softmax_scale, "softcap": softcap, "window": window_of(*window_size)}
    return attend(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k.diff(), **options)


def new_varlen(
    q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, cu_seqlens_q: Tensor, max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None, seqused_k: Tensor | None = None, softmax_scale: float = 1.0,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert causal
    assert cu_seqlens_k is None
    assert seqused_k is not None
    assert block_table is not None
    options = {"scale": softmax_scale, "softcap": softcap, "window": window_of(*window_size)}
    return attend(q, k, v, block_table, cu_seqlens_q, seqused_k, **options)


class Wrapper:
    """flashinfer's wrapper of the same interface."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD"

    def plan(self, **values: Any) -> None:
        assert set(values) == PLAN_ARGUMENTS
        self.values = values

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
        v = self.values
        starts = v["paged_kv_indptr"].tolist()
        counts = np.diff(starts)
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for r, count in enumerate(counts):
            tables[r, :count] = v["paged_kv_indices"][starts[r] : starts[r + 1]]
        lengths = (torch.tensor(counts) - 1) * v["page_size"] + v["paged_kv_last_page_len"]
        return attend(
            q, *caches, tables, v["qo_indptr"], lengths, scale=v["sm_scale"], softcap=v["logits_soft_cap"] or 0.0,
            window=v["window_left"] + 1,
        )  # fmt: skip


BACKENDS: dict[str, AttentionBackend] = {
    "flash 2": VllmFlashAttention(FLASH_2, flash_operator("block_table"), {}),
    "flash 3": VllmFlashAttention(FLASH_3, flash_operator("page_table"), {}),
    "a package, by sums": ModuleFlashAttention(old_varlen),
    "a package, by lengths": ModuleFlashAttention(new_varlen),
    "flash-attn-3": Flash3Attention(flash3_function),
    "flashinfer": FlashinferAttention(Wrapper, torch.device("cpu")),
}
SHAPES = [
    AttentionShape(0, 4, 2, 16, 0.25),
    AttentionShape(1, 4, 2, 16, 0.3, 2.0, 20),
    AttentionShape(0, 4, 2, 16, 0.3, window=1),
]


def pool(num_blocks: int = 12) -> TinyPool:
    found = TinyPool(Args(), num_blocks, 16)
    for cache in (*found.k, *found.v):
        cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(0)))
    return found


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_is_what_plain_torch_computes(name: str) -> None:
    pieces = [Piece(range(90), 30, 47, [3, 9, 1]), Piece(range(90), 0, 1, [2]), Piece(range(90), 79, 80, range(4, 9))]
    results = []
    for backend in (BACKENDS[name], TorchAttention()):
        cache = pool()
        batch = DeviceBatch.of(make_batch(cache, pieces), cache, torch.device("cpu"))
        planned = backend.plan(batch)
        generator = torch.Generator().manual_seed(1)
        outs = []
        for shape in SHAPES:
            qkv = torch.randn(19, 8, 16, generator=generator)
            write_slots(batch, shape.layer, qkv[:, 4:6], qkv[:, 6:])
            outs += [planned.run(shape, qkv[:, :4] * factor) for factor in (1, 2)]
        results.append(outs)
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == (19, 64)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", [*BACKENDS, "torch"])
def test_layers_of_two_groups_have_tables_of_their_own(name: str) -> None:
    """The second group's layer writes and reads where its tables say; blocks behind its window are nobody's."""
    backend = {**BACKENDS, "torch": TorchAttention()}[name]
    pieces = [Piece(range(90), 30, 47, [3, 9, 1]), Piece(range(90), 79, 80, range(4, 9))]
    others = [Piece(range(90), 30, 47, [12, 10, 2]), Piece(range(90), 79, 80, [0, 0, 0, 13, 11])]
    shapes = [AttentionShape(0, 4, 2, 16, 0.25), AttentionShape(1, 4, 2, 16, 0.3, window=20)]
    generator = torch.Generator().manual_seed(1)
    qkvs = [torch.randn(18, 8, 16, generator=generator) for _ in shapes]

    def outputs(groups: list[int]) -> list[Tensor]:
        cache = pool(14)
        # Where layers have different blocks, a block's memory may serve both.
        cache.k[1], cache.v[1] = cache.k[0], cache.v[0]
        cache.groups = groups
        batch, other = make_batch(cache, pieces), make_batch(cache, others)
        batch.further_groups = (GroupTables(other.slot_mapping, other.block_tables),)
        on_device = DeviceBatch.of(batch, cache, torch.device("cpu"))
        planned = backend.plan(on_device)
        outs = []
        for shape, qkv in zip(shapes, qkvs, strict=True):
            write_slots(on_device, shape.layer, qkv[:, 4:6], qkv[:, 6:])
            outs.append(planned.run(shape, qkv[:, :4]))
        return outs

    cache = pool(14)
    expected = []
    for shape, qkv, of_group in zip(shapes, qkvs, (pieces, others), strict=True):
        of_one = DeviceBatch.of(make_batch(cache, of_group), cache, torch.device("cpu"))
        alone = AttentionShape(0, 4, 2, 16, shape.scale, window=shape.window)
        write_slots(of_one, 0, qkv[:, 4:6], qkv[:, 6:])
        expected.append(TorchAttention().plan(of_one).run(alone, qkv[:, :4]))
    for ours, theirs in zip(outputs([0, 1]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(outputs([0, 0])[1], expected[1])


def test_block_lists_leave_out_what_is_not_used() -> None:
    host = make_batch(pool(), [Piece(range(90), 0, 33, [3, 9, 1]), Piece(range(90), 15, 16, [2])])
    starts, blocks, last = block_lists(host.block_tables, host.context_lens, 16)
    assert starts.tolist() == [0, 3, 4]
    assert blocks.tolist() == [3, 9, 1, 2]
    assert last.tolist() == [1, 16]
