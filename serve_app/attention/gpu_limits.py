"""What libraries of attention kernels for CUDA can do, as a table of limits that a model's needs are held against.

All of them know soft caps and sliding windows; none reads an e4m3 cache with a scale for each head beside 16-bit
queries.
"""

from dataclasses import dataclass

import torch

from serve_app.attention.backend import AttentionNeeds

DTYPES = (torch.float16, torch.bfloat16)
HEAD_MULTIPLE, LARGEST_HEAD = 8, 256


@dataclass(frozen=True, slots=True)
class Limits:
    """architectures: the first and the one after the last compute capability. head_dims: those alone, where not None.
    block_multiple: of a block's tokens."""

    architectures: tuple[tuple[int, int], tuple[int, int]]
    head_dims: tuple[int, ...] | None = None
    block_multiple: int = 1
    is_graph_safe: bool = True

    def refusal(self, needs: AttentionNeeds) -> str | None:
        """Why a model cannot be served within these limits; None where it can."""
        first, end = self.architectures
        if needs.device.type != "cuda" or needs.architecture is None:
            return f"the model is on {needs.device.type}"
        if not first <= needs.architecture < end:
            found = f"{needs.architecture[0]}.{needs.architecture[1]}"
            return f"it is for compute capability {first[0]}.{first[1]} to below {end[0]}.{end[1]}, not {found}"
        if needs.dtype not in DTYPES:
            return f"it does not compute in {_name(needs.dtype)}"
        if needs.is_fp8:
            return "it reads no e4m3 cache with a scale for each head beside 16-bit queries"
        if needs.kv_dtype != needs.dtype:
            return f"the KV cache is {_name(needs.kv_dtype)}, the queries are {_name(needs.dtype)}"
        return self._refusal_of_shape(needs)

    def _refusal_of_shape(self, needs: AttentionNeeds) -> str | None:
        for head_dim in sorted(needs.head_dims):
            if self.head_dims is not None and head_dim not in self.head_dims:
                return f"heads of {head_dim} are none of {', '.join(map(str, self.head_dims))}"
            if head_dim % HEAD_MULTIPLE or head_dim > LARGEST_HEAD:
                return f"heads of {head_dim} are no multiple of {HEAD_MULTIPLE} up to {LARGEST_HEAD}"
        if needs.block_size % self.block_multiple:
            return f"blocks of {needs.block_size} are no multiple of {self.block_multiple}"
        if needs.wants_graphs and not self.is_graph_safe:
            return "its steps cannot be captured in a CUDA graph"
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
