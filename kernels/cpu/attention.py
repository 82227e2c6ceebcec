"""Native paged attention on float32 queries. See kernels.reference.attention for what it computes."""

import math

import torch
from torch import Tensor

from kernels.cpu import _native
from kernels.cpu.layers import KV_CODES, require


class AttentionPlan:
    """Paged causal attention of one step; the tables are checked and cut into even units once for all layers.

    A query's result has the same bits however its request's tokens are cut into steps, whatever the threads and the
    other requests are.
    """

    def __init__(
        self,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        num_tokens: int,
        cache_shape: tuple[int, int, int, int],
        n_heads: int,
        head_dim: int | None = None,
        num_threads: int = 0,
    ) -> None:
        """block_tables [R, max_blocks], query_start [R + 1], context_lens [R], all int32; kept alive here.

        cache_shape [num_blocks, block_size, n_kv_heads, row]; head_dim is to be given where a row is something else.
        num_threads: for how many to cut, 0 for the team's.
        """
        num_blocks, block_size, n_kv_heads, row = cache_shape
        head_dim = head_dim or row
        require(n_heads % n_kv_heads == 0 and block_tables.dtype == torch.int32)
        require(block_tables.shape[1] <= 1 or block_tables.stride(1) == 1)
        require(query_start.dtype == context_lens.dtype == torch.int32)
        require(query_start.is_contiguous() and context_lens.is_contiguous())
        require(len(query_start) == len(context_lens) + 1 and len(block_tables) == len(context_lens))
        self._tensors = (block_tables, query_start, context_lens)
        self._shape = (num_tokens, n_heads, head_dim)
        self._cache = (num_blocks, block_size, n_kv_heads)
        self._plan = _native.AttentionPlan()
        self._plan.make(
            block_tables.data_ptr(),
            block_tables.stride(0) if len(block_tables) > 1 else block_tables.shape[1],
            query_start.data_ptr(),
            context_lens.data_ptr(),
            len(context_lens),
            num_tokens,
            num_blocks,
            block_size,
            n_heads,
            n_kv_heads,
            head_dim,
            num_threads,
        )

    @property
    def num_units(self) -> int:
        """In how many pieces of work the step is cut."""
        return self._plan.num_units

    def run(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        window: int = 0,
    ) -> Tensor:
        """q [T, n_heads, head_dim], only the first dimension strided → [T, n_heads * head_dim].

        scale: of the scores, 1 / sqrt(head_dim) if None; softcap: 0 for none; window: how many keys a query sees,
        itself included, 0 for all.
        """
        tokens, n_heads, head_dim = self._shape
        require(q.shape == self._shape and q.dtype == torch.float32 and q.stride()[1:] == (head_dim, 1))
        kv_type = KV_CODES[k_cache.dtype]
        row = _native.kv_row_bytes(kv_type, head_dim) // k_cache.element_size()
        for cache in (k_cache, v_cache):
            require(cache.is_contiguous() and cache.shape == (*self._cache, row) and KV_CODES[cache.dtype] == kv_type)
        out = torch.empty((tokens, n_heads * head_dim))
        self._plan.run(
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            out.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            kv_type,
            1.0 / math.sqrt(head_dim) if scale is None else scale,
            softcap,
            window,
        )
        return out
