"""The flat arrays of one step."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    Counts = NDArray[np.int32]


@dataclass(slots=True)
class ForwardBatch:
    """One step's work, on the host. T tokens of R requests; request r owns query_start[r] : query_start[r + 1].

    token_ids [T] int64, positions [T] int64, slot_mapping [T] int64 (slot = block id * block size + offset),
    block_tables [R, max_blocks] int32 (entries past a request's last block are 0), query_start [R + 1] int32,
    context_lens [R] int32: tokens of each request once this step is done, those of this step included.
    logit_index [L] int64: the tokens whose logits are wanted; the first S = len(sample_rows) of them are sampled, the
    others (prompt log-probabilities) are returned as they are. sample_rows [S] int64: the sampler's row of each sampled
    request; sample_positions [S] int64: the position of the token to be drawn (its random number depends on it).
    All are contiguous.
    """

    token_ids: "Ids"
    positions: "Ids"
    slot_mapping: "Ids"
    block_tables: "Counts"
    query_start: "Counts"
    context_lens: "Counts"
    logit_index: "Ids"
    sample_rows: "Ids"
    sample_positions: "Ids"
    max_query_len: int
    max_context_len: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.context_lens)
