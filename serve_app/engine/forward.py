"""The two ways to run a model's forward over a step: as one native program, and operation by operation."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from serve_app.attention.backend import AttentionBackend, AttentionNeeds
from serve_app.attention.choose import architecture_of, choose_backend
from serve_app.attention.device_batch import DeviceBatch
from serve_app.batch import ForwardBatch
from serve_app.engine.graph_forward import NO_GRAPHS, CudaRecorder, GraphForward, GraphLimits
from serve_app.engine.last_tokens import LastTokens
from serve_app.engine.logits_ops import Logits
from serve_app.layers.shape_probe import ShapeProbe
from serve_app.layers.step_choice import step_type
from serve_app.layers.torch_step import TorchStep
from serve_app.models.base import CausalLM

if TYPE_CHECKING:
    from kernels.cpu.program import RecordedProgram
    from serve_app.kv_cache.kv_pool import KvPool

log = logging.getLogger(__name__)


class Forward(Protocol):
    """Computes a step. After an error the step's KV slots may hold anything."""

    def __call__(self, batch: ForwardBatch) -> Logits:
        """The logits of batch.logit_index, which the next step may overwrite."""
        ...


def choose_forward(
    model: CausalLM,
    kv: "KvPool",
    device: torch.device | str,
    attention: str = "auto",
    *,
    is_exact: bool = False,
    graphs: GraphLimits | None = None,
    drawn: LastTokens | None = None,
) -> Forward:
    """The native program where the attention backend is the CPU's, else operations one by one. See choose_backend.

    graphs: decode steps are recorded as CUDA graphs where the model is on such a device and the backend allows it.
    drawn: where tokens come from that the host does not know yet; not used by the native program.
    """
    device = torch.device(device)
    wants_graphs = graphs is not None and device.type == "cuda"
    # Who names a backend gets it, with graphs or without.
    needs = attention_needs(model, kv, device, wants_graphs=wants_graphs and attention == "auto")
    backend = choose_backend(needs, attention)
    if backend is None:
        return NativeForward(model, kv, is_exact=is_exact)
    forward = TorchForward(model, kv, device, backend, drawn)
    if graphs is None or not wants_graphs:
        return forward
    if not forward.is_graph_safe:
        log.warning(NO_GRAPHS)
        return forward
    return GraphForward(forward.run, forward, kv, model.args.vocab_size, graphs, CudaRecorder(device))


def attention_needs(
    model: CausalLM, kv: "KvPool", device: torch.device, *, wants_graphs: bool = False
) -> AttentionNeeds:
    """What a model over a pool asks of an attention backend."""
    probe = _probed(model)
    return AttentionNeeds(
        device, architecture_of(device), probe.dtype, kv.dtype, kv.block_size, tuple(probe.shapes),
        wants_graphs and not probe.has_single_experts,
    )  # fmt: skip


def _probed(model: CausalLM) -> ShapeProbe:
    probe = ShapeProbe()
    model.forward(probe)
    return probe


class TorchForward:
    """See Forward: one operator after the other, torch's or, where they can run, Triton's."""

    def __init__(
        self,
        model: CausalLM,
        kv: "KvPool",
        device: torch.device,
        backend: AttentionBackend,
        drawn: LastTokens | None = None,
    ) -> None:
        """drawn: see choose_forward."""
        self._drawn = drawn
        self._model = model
        self._kv = kv
        self._device = device
        self._backend = backend
        self._step_type = step_type(device, backend.name)

    @property
    def is_graph_safe(self) -> bool:
        """Whether a step can be captured. Plain torch writes no slot of -1, with which graphs are filled up; and
        nothing may wait for the device, as experts without planes do."""
        if not self._backend.is_graph_safe or self._step_type is TorchStep:
            return False
        return not _probed(self._model).has_single_experts

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """See Forward."""
        return self.run(DeviceBatch.of(batch, self._kv, self._device)).float()

    def run(self, batch: DeviceBatch) -> Tensor:
        """The same for a step that is on the device already; logits in the compute dtype."""
        with torch.no_grad():
            if self._drawn is not None:
                batch = replace(batch, token_ids=self._drawn.resolve(batch.token_ids))
            step = self._step_type(batch, self._backend)
            hidden = step.wanted(self._model.forward(step))
            logits: Tensor = self._model.logits(hidden, step)
        return logits


class NativeForward:
    """See Forward: the model's forward is recorded once; a step is a call without the GIL and without torch."""

    def __init__(self, model: CausalLM, kv: "KvPool", *, is_exact: bool) -> None:
        """Records now; the pool's memory must outlive this object's last step."""
        self.program = record(model, kv, is_exact=is_exact)

    def __call__(self, batch: ForwardBatch) -> Logits:
        """See Forward."""
        return self.program.run(
            batch.token_ids,
            batch.positions,
            batch.logit_index,
            batch.query_start,
            batch.context_lens,
            [(group.slot_mapping, group.block_tables) for group in batch.groups],
            batch.max_context_len,
        )


def record(model: CausalLM, kv: "KvPool", *, is_exact: bool) -> "RecordedProgram":
    """The native program of a model over a pool."""
    from kernels.cpu.program import Recording
    from serve_app.layers.native_step import KV_TYPES, NativeCache, NativeStep

    recording = Recording()
    k, v = ([layer.data_ptr() for layer in layers] for layers in (kv.k, kv.v))
    step = NativeStep(recording, NativeCache(k, v, KV_TYPES[kv.dtype], kv.groups), is_exact=is_exact)
    result = model.logits(step.wanted(model.forward(step)), step)
    return recording.finish(result, kv.num_blocks, kv.block_size)
