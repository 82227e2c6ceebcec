"""The flat tensors of one step: the only argument of a layer besides its input."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from serve_app.attention.backend import PlannedAttention
    from serve_app.kv_cache.kv_pool import KvPool


@dataclass(slots=True)
class ForwardBatch:
    """One step's work. T tokens of R requests; request r owns tokens query_start[r] : query_start[r + 1].

    token_ids [T] int64, positions [T] int64, slot_mapping [T] int64 (slot = block id * block size + offset),
    block_tables [R, max_blocks] int32 (entries past a request's last block are 0), query_start [R + 1] int32,
    context_lens [R] int32: tokens of each request once this step is done, those of this step included.
    logit_index [L] int64: the tokens whose logits are wanted; the first S = len(sample_rows) of them are sampled, the
    others (prompt log-probabilities) are returned as they are. sample_rows [S] int64: the sampler's row of each sampled
    request; sample_positions [S] int64: the position of the token to be drawn (its random number depends on it).
    Tensors live on the model's device, except the host copies max_query_len and max_context_len.
    kv: the pool the step reads and writes. attention: this step's plan, set by the model runner before the forward.
    """

    token_ids: "Tensor"
    positions: "Tensor"
    slot_mapping: "Tensor"
    block_tables: "Tensor"
    query_start: "Tensor"
    context_lens: "Tensor"
    logit_index: "Tensor"
    sample_rows: "Tensor"
    sample_positions: "Tensor"
    max_query_len: int
    max_context_len: int
    kv: "KvPool"
    attention: "PlannedAttention | None" = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_ids.shape[0])

    @property
    def num_requests(self) -> int:
        """R."""
        return int(self.context_lens.shape[0])

    @property
    def device(self) -> "torch.device":
        """Where the step runs."""
        return self.token_ids.device
