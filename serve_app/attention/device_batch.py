"""A step's arrays on the device, for forwards that are no native program."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.attention.array_pack import to_device
from serve_app.batch import ForwardBatch


class Cache(Protocol):
    """Keys and values by layer; see kv_cache.kv_pool.KvPool."""

    @property
    def groups(self) -> Sequence[int]: ...
    @property
    def k(self) -> list[Tensor]: ...
    @property
    def v(self) -> list[Tensor]: ...
    @property
    def k_scales(self) -> list[Tensor] | None: ...
    @property
    def v_scales(self) -> list[Tensor] | None: ...


@dataclass(slots=True)
class DeviceBatch:
    """What the forward needs of a ForwardBatch, as tensors on the model's device.

    slot_mappings, block_tables: by group of layers. groups: each layer's. host: where it came from. k, v: each layer's
    cache [num_blocks, block_size, n_kv_heads, head_dim]. k_scales, v_scales: each layer's scales [n_kv_heads] where the
    caches are float8_e4m3fn, else None.
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    context_lens: Tensor
    logit_index: Tensor
    slot_mappings: Sequence[Tensor]
    block_tables: Sequence[Tensor]
    host: ForwardBatch
    groups: Sequence[int]
    k: list[Tensor]
    v: list[Tensor]
    k_scales: list[Tensor] | None = None
    v_scales: list[Tensor] | None = None

    def slots(self, layer: int) -> Tensor:
        """Where a layer's keys and values of the step's tokens go, [T]."""
        return self.slot_mappings[self.groups[layer]]

    def tables(self, layer: int) -> Tensor:
        """A layer's block tables [R, max_blocks]."""
        return self.block_tables[self.groups[layer]]

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """A layer's scales of keys and of values."""
        if self.k_scales is None or self.v_scales is None:
            return None, None
        return self.k_scales[layer], self.v_scales[layer]

    @classmethod
    def of(cls, host: ForwardBatch, cache: Cache, device: torch.device) -> "DeviceBatch":
        """Copies the arrays to the device; cache: what the step reads and writes."""
        return cls.over(to_device(step_arrays(host), device), host, cache)

    @classmethod
    def over(cls, tensors: Sequence[Tensor], host: ForwardBatch, cache: Cache) -> "DeviceBatch":
        """Over the arrays of step_arrays(host), which are on the device already."""
        token_ids, positions, query_start, context_lens, logit_index, *of_groups = tensors
        return cls(
            token_ids, positions, query_start, context_lens, logit_index, of_groups[::2], of_groups[1::2], host,
            cache.groups, cache.k, cache.v, cache.k_scales, cache.v_scales,
        )  # fmt: skip


def step_arrays(host: ForwardBatch) -> tuple[NDArray[Any], ...]:
    """What of a step goes to the device, in the order of DeviceBatch's first fields, then slots and tables of each
    group."""
    of_groups = [a for group in host.groups for a in (group.slot_mapping, group.block_tables)]
    return (host.token_ids, host.positions, host.query_start, host.context_lens, host.logit_index, *of_groups)
