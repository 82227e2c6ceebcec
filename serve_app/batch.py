"""The flat arrays of one step."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    Counts = NDArray[np.int32]
    Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GroupTables:
    """Where a further group of layers has the step's tokens and contexts, see ForwardBatch.

    slot_mapping [T] int64, block_tables [R, max_blocks] int32, contiguous.
    """

    slot_mapping: "Ids"
    block_tables: "Counts"


@dataclass(frozen=True, slots=True)
class DraftChances:
    """What some of the proposed tokens were sampled from.

    places [n] int64: which ones, as indexes into Drafts.token_ids; candidates [n, K] int64: the ids that each could
    have been, chances [n, K] float32: how likely each was. Ids with the chance 0 may be any, and stand there again.
    """

    places: "Ids"
    candidates: "Ids"
    chances: "Floats"


@dataclass(frozen=True, slots=True)
class Drafts:
    """Proposed tokens of a step's sampled requests, which are to be compared with what is drawn.

    counts [S] int64: how many of each; token_ids [sum(counts)] int64. Request s has counts[s] + 1 rows of sampled
    logits, one behind its last known token and one behind each proposed one. chances: where some were sampled by a
    draft that says what from; they are accepted or rejected by that.
    """

    counts: "Ids"
    token_ids: "Ids"
    chances: DraftChances | None = None


@dataclass(slots=True)
class ForwardBatch:
    """One step's work, on the host. T tokens of R requests; request r owns query_start[r] : query_start[r + 1].

    token_ids [T] int64, positions [T] int64 (rows of the rotary tables: where a request's set of angles begins there,
    plus the token's place in its text), slot_mapping [T] int64 (slot = block id * block size + offset),
    block_tables [R, max_blocks] int32 (what stands past a request's last block, or before its window, is some valid id
    and is not read), query_start [R + 1] int32,
    context_lens [R] int32: tokens of each request once this step is done, those of this step included.
    logit_index [L] int64: the tokens whose logits are wanted; the first of them are sampled, one for each of the
    S = len(sample_rows) requests where there are no drafts, and the others (prompt log-probabilities) are returned as
    they are. sample_rows [S] int64: the sampler's row of each sampled
    request; sample_positions [S] int64: the position of the first token to be drawn (random numbers depend on it).
    further_groups: of layers that have slots and tables of their own; slot_mapping and block_tables are the first's.
    drafts: where tokens were proposed, which stand among token_ids; else each sampled request has one row of logits.
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
    further_groups: tuple[GroupTables, ...] = ()
    drafts: Drafts | None = None

    @property
    def groups(self) -> tuple[GroupTables, ...]:
        """Of all groups of layers."""
        return (GroupTables(self.slot_mapping, self.block_tables), *self.further_groups)

    @property
    def num_sampled(self) -> int:
        """Rows of logits that tokens are drawn from."""
        return len(self.sample_rows) + (0 if self.drafts is None else len(self.drafts.token_ids))

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.context_lens)
