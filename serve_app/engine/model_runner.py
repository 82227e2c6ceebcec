"""One step on the device: a batch in, token ids out, exactly one forward."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.attention.choose import choose_backend
from serve_app.batch import ForwardBatch
from serve_app.engine.sampler import Sampler, StepLogprobs
from serve_app.models.base import CausalLM

if TYPE_CHECKING:
    from serve_app.kv_cache.kv_pool import KvPool


@dataclass(slots=True)
class StepResult:
    """What a step computed, on the host except extra_logits.

    token_ids [S] int64: the drawn token of each of batch.sample_rows. logprobs: None when no row asked for them.
    extra_logits [L - S, vocab] float32: those wanted beyond the sampled ones, in the order of batch.logit_index;
    None when there are none.
    """

    token_ids: NDArray[np.int64]
    logprobs: StepLogprobs | None
    extra_logits: Tensor | None


class ModelRunner:
    """Owns the model, the KV tensors and the sampler of one engine."""

    def __init__(
        self, model: CausalLM, sampler: Sampler, kv_pool: "KvPool", device: str | torch.device, attention: str = "auto"
    ) -> None:
        """attention: name of an attention backend, 'auto' = the first of the order that can run here (LaunchError
        where the named one cannot)."""
        self.model = model
        self.sampler = sampler
        self.kv_pool = kv_pool
        self.attention = choose_backend(device, kv_pool.k[0].dtype, attention)

    def execute(self, batch: ForwardBatch) -> StepResult:
        """Runs the step: plans attention, one forward, logits where wanted, one draw per sampled row.

        After an error (a broken batch, a failing kernel) the rows' states are those from before the step, and KV slots
        of the step may hold anything.
        """
        with torch.inference_mode():
            # Before the forward: on a GPU this waits for a few bytes, after it for the whole step.
            rows, positions = batch.sample_rows.cpu().numpy(), batch.sample_positions.cpu().numpy()
            hidden = self._forward(batch)
            wanted = batch.logit_index.shape[0]
            if wanted == 0:
                return StepResult(rows, None, None)
            logits = self.model.logits(hidden.index_select(0, batch.logit_index))
            num_sampled = len(rows)
            token_ids, logprobs = rows, None
            if num_sampled:
                sampled = self.sampler.sample(logits[:num_sampled], rows, positions)
                token_ids, logprobs = sampled.token_ids, sampled.logprobs
        # Cloned outside, so that the caller gets an ordinary tensor, without the sampled rows behind it.
        extra = logits[num_sampled:].clone() if wanted > num_sampled else None
        return StepResult(token_ids, logprobs, extra)

    def _forward(self, batch: ForwardBatch) -> Tensor:
        batch.attention = self.attention.plan(batch)
        try:
            return self.model.forward(batch)
        finally:
            # The plan refers to the batch: no cycle may be left for the garbage collector.
            batch.attention = None
