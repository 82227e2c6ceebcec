"""A runner that computes nothing: the engine's host side by itself, for benchmarks and tests."""

from collections.abc import Sequence

import numpy as np

from serve_app.batch import ForwardBatch
from serve_app.engine.model_runner import StepResult
from serve_app.engine.request import UNKNOWN
from serve_app.options import SamplingParams


class NullSampler:
    """Keeps each row's seed only."""

    def __init__(self, max_rows: int) -> None:
        self.seeds = np.zeros(max_rows, np.int64)

    def set_row(
        self, row: int, params: SamplingParams, seed: int, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> None:
        """Remembers the seed, all that the ids depend on."""
        assert min(prompt_ids) >= 0
        assert min(output_ids, default=0) >= 0, "a row is set up before its last token is known"
        self.seeds[row] = seed % 1009

    def clear_row(self, row: int) -> None:
        """Forgets the row."""
        self.seeds[row] = -1


class NullRunner:
    """Returns ids that depend on a request's seed and the position alone, so that outputs can be checked."""

    def __init__(self, max_rows: int, first_id: int, last_id: int, *, overlaps: bool = False) -> None:
        """overlaps: the engine may leave tokens unknown that this runner has drawn in the step before."""
        self.sampler = NullSampler(max_rows)
        self.overlaps = overlaps
        self._first_id = first_id
        self._count = last_id - first_id + 1
        self._drew = np.zeros(max_rows, np.bool_)

    def execute(self, batch: ForwardBatch) -> StepResult:
        """One id for each sampled row."""
        if self.overlaps:
            unknown = UNKNOWN - batch.token_ids[batch.token_ids < 0]
            assert self._drew[unknown].all(), "a token is unknown that the step before has not drawn"
            self._drew[:] = False
            self._drew[batch.sample_rows] = True
        else:
            assert (batch.token_ids >= 0).all()
        seeds = self.sampler.seeds[batch.sample_rows]
        return StepResult(self.expected(seeds, batch.sample_positions), None, None)

    def expected(self, seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The ids drawn at these positions, int64."""
        return self._first_id + (seeds + positions * 7) % self._count
