"""One step on the device: a batch in, token ids out, exactly one forward."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.batch import ForwardBatch
from serve_app.engine.device_choice import on_device
from serve_app.engine.forward import Forward, choose_forward
from serve_app.engine.graph_forward import GraphForward, GraphLimits
from serve_app.engine.last_tokens import LastTokens
from serve_app.engine.sampler import Draw, Sampler, StepLogprobs
from serve_app.engine.speculation.verify import verify
from serve_app.models.base import CausalLM

if TYPE_CHECKING:
    from serve_app.kv_cache.kv_pool import KvPool


OVERLAPPING = ("cuda",)
"""Devices that compute while the host does something else."""


@dataclass(slots=True)
class StepResult:
    """What a step computed, on the host except extra_logits.

    token_ids [S] int64: the drawn token of each of batch.sample_rows. logprobs: None when no row asked for them.
    extra_logits [L - S, vocab] float32: those wanted beyond the sampled ones, in the order of batch.logit_index;
    None when there are none. counts: None, or after a batch with drafts [S] int64: how many tokens were drawn for each
    of batch.sample_rows; token_ids and logprobs then hold so many for each.
    """

    token_ids: NDArray[np.int64]
    logprobs: StepLogprobs | None
    extra_logits: Tensor | None
    counts: NDArray[np.int64] | None = None

    def wait(self) -> "StepResult":
        """See PendingStep: this one is done."""
        return self


@dataclass(slots=True)
class PendingStep:
    """A step that the device has been given."""

    draw: Draw
    extra_logits: Tensor | None

    def wait(self) -> StepResult:
        """What it computed, when it is done."""
        sampled = self.draw.wait()
        return StepResult(sampled.token_ids, sampled.logprobs, self.extra_logits)


class ModelRunner:
    """Owns the model, the KV tensors and the sampler of one engine."""

    def __init__(
        self,
        model: CausalLM,
        sampler: Sampler,
        kv_pool: "KvPool",
        device: str | torch.device,
        attention: str = "auto",
        *,
        is_exact: bool = False,
        graphs: GraphLimits | None = None,
        overlaps: bool = False,
    ) -> None:
        """attention: name of an attention backend, 'auto' = the first of the order that can run here (LaunchError
        where the named one cannot). is_exact: native products take their input as it is. graphs: see choose_forward.
        overlaps: on a CUDA device a step may be begun before the host knows the tokens of the last one."""
        self.model: CausalLM | None = model
        self.sampler = sampler
        self.kv_pool = kv_pool
        self.device = device
        can_overlap = torch.device(device).type in OVERLAPPING
        self._drawn = LastTokens(sampler.max_rows, device) if overlaps and can_overlap else None
        self._choose = partial(
            choose_forward,
            kv=kv_pool,
            device=device,
            attention=attention,
            is_exact=is_exact,
            graphs=graphs,
            drawn=self._drawn,
        )
        self._place = on_device(device)
        self._forward: Forward | None = self.forward_of(model)

    def forward_of(self, model: CausalLM) -> Forward:
        """How a model of the same shape is run over the same pool: recorded and planned now, in whichever thread."""
        with on_device(self.device):
            return self._choose(model)

    def exchange(self, model: CausalLM | None, forward: Forward | None) -> tuple[CausalLM | None, Forward | None]:
        """Puts another model in the place of this one, which it returns. Only between two steps; None: no step can run
        until there is one again."""
        old = self.model, self._forward
        self.model, self._forward = model, forward
        return old

    @property
    def num_graphs(self) -> int:
        """CUDA graphs that steps are replayed from."""
        return self._forward.num_graphs if isinstance(self._forward, GraphForward) else 0

    @property
    def overlaps(self) -> bool:
        """Whether token_ids of a batch may be UNKNOWN - row: what that row drew in the step before."""
        return self._drawn is not None

    def execute(self, batch: ForwardBatch) -> StepResult | PendingStep:
        """Begins the step: one forward, logits where wanted, one draw per sampled row.

        After an error (a broken batch, a failing kernel) the rows' states are those from before the step, and KV slots
        of the step may hold anything.
        """
        with self._place:
            return self._execute(batch)

    def _execute(self, batch: ForwardBatch) -> StepResult | PendingStep:
        assert self._forward is not None, "a step without a model"
        logits = self._forward(batch)
        num_sampled, num_wanted = batch.num_sampled, len(batch.logit_index)
        extra = None
        if num_wanted > num_sampled:
            # A copy: the sampler and the next step write into what the forward returned.
            extra = torch.as_tensor(logits[num_sampled:]).clone()
        if not num_sampled:
            return StepResult(batch.sample_rows, None, extra)
        if batch.drafts is not None:
            verified = verify(
                self.sampler, logits[:num_sampled], batch.sample_rows, batch.sample_positions, batch.drafts
            )
            return StepResult(verified.sampled.token_ids, verified.sampled.logprobs, extra, verified.counts)
        draw = self.sampler.sample(logits[:num_sampled], batch.sample_rows, batch.sample_positions)
        if self._drawn is not None:
            assert isinstance(draw.token_ids, Tensor)
            self._drawn.keep(batch.sample_rows, draw.token_ids)
        return PendingStep(draw, extra)
