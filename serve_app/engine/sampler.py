"""Logits to token ids, for all rows at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.engine.token_mask import TokenMask
from serve_app.options import SamplingParams


@dataclass(slots=True)
class StepLogprobs:
    """Log-probabilities of the raw model distribution (before penalties, temperature and filters).

    chosen [S] float32, top_ids [S, k] int64 and top_logprobs [S, k] float32, best first; k is the largest that a row
    asked for. Rows that did not ask hold NaN and -1.
    """

    chosen: NDArray[np.float32]
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float32]


@dataclass(slots=True)
class Sampled:
    """token_ids [S] int64 on the host."""

    token_ids: NDArray[np.int64]
    logprobs: StepLogprobs | None


class Sampler:
    """Persistent per-row parameters and one vectorised draw for all rows of a step."""

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        device: str | torch.device = "cpu",
        eos_ids: Sequence[int] = (),
        breaker_ids: Callable[[str], Sequence[int]] = lambda text: (),
    ) -> None:
        """eos_ids are what min_tokens forbids (with params.stop_token_ids).

        breaker_ids gives the token ids that a DRY sequence breaker string stands for (those whose text contains it).
        """
        raise NotImplementedError

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int] = (),
        mask: TokenMask | None = None,
    ) -> None:
        """Gives the row to a choice: at admission, and again after a preemption with what it has put out so far.

        seed is any integer, taken modulo 2**64. mask stands after output_ids already; the sampler advances it.
        """
        raise NotImplementedError

    def clear_row(self, row: int) -> None:
        """The row's choice ended or was preempted."""
        raise NotImplementedError

    def fork_row(self, src: int, dst: int, seed: int) -> None:
        """Gives dst to another choice of src's request: same state, its own seed."""
        raise NotImplementedError

    def sample(self, logits: Tensor, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Sampled:
        """Draws one token for each row and updates the rows' states with it.

        logits [S, vocab_size] float32 on the device (overwritten), rows [S] without repetition, positions [S] of the
        tokens to be drawn: the random number is a function of the row's seed and the position alone.
        """
        raise NotImplementedError
