"""A step by Triton's kernels between the matrix products: fewer passes over memory, fewer launches."""

import torch
from torch import Tensor

from kernels.gpu import activation as activations
from kernels.gpu import grouped_matmul as grouped
from kernels.gpu import norm as norms
from kernels.gpu.kv_write import rope_kv
from kernels.gpu.routing import Groups, route
from serve_app.attention.backend import AttentionShape
from serve_app.layers.step import Activation, AngleTable, MixtureWeights, NormWeights, Routing
from serve_app.layers.torch_step import TorchStep
from serve_app.quant.planar_weight import grouped_matrix


class GpuStep(TorchStep):
    """See Step: what is not here is plain torch. Nothing waits for the device, but packed experts that have no planes.

    Rotated queries stay in their rows; rotated keys, and values, go straight to their slots.
    """

    def norm(self, x: Tensor, weights: NormWeights) -> Tensor:
        """See Step."""
        if weights.is_layer_norm:
            return norms.layer_norm(x, weights.weight, weights.bias, weights.epsilon, offset=weights.offset)
        return norms.rms_norm(x, weights.weight, weights.epsilon, offset=weights.offset)

    def add_norm(self, x: Tensor, residual: Tensor, weights: NormWeights) -> Tensor:
        """See Step."""
        if weights.is_layer_norm:
            return norms.layer_norm(
                x, weights.weight, weights.bias, weights.epsilon, offset=weights.offset, residual=residual
            )
        return norms.add_rms_norm(x, residual, weights.weight, weights.epsilon, offset=weights.offset)

    def head_norm(self, qkv: Tensor, first: int, count: int, weights: NormWeights) -> None:
        """See Step."""
        width = weights.weight.shape[0]
        heads = qkv.view(qkv.shape[0], -1, width)[:, first : first + count]
        norms.rms_norm(heads, weights.weight, weights.epsilon, offset=weights.offset, out=heads)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """See Step."""
        return activations.activate(x, activation)

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See Step."""
        return activations.gate(gate_up, activation)

    def experts(self, x: Tensor, weights: MixtureWeights, routing: Routing, activation: Activation) -> Tensor:
        """See Step."""
        gate, up, down = (grouped_matrix(part) for part in (weights.gate, weights.up, weights.down))
        if gate is None or up is None or down is None:
            return super().experts(x, weights, routing, activation)
        logits = weights.router.matmul(x)
        chosen, factors = route(logits, routing.kind, routing.top_k, routing.is_renormalised, routing.jitter)
        groups = Groups.of(chosen, weights.gate.num_experts)
        return grouped.combined(down, grouped.gated(gate, up, x, groups, activation), groups, factors)

    def attention(self, qkv: Tensor, shape: AttentionShape, rotary: AngleTable | None) -> Tensor:
        """See Step."""
        batch, counts = self._batch, [shape.n_heads, shape.n_kv_heads, shape.n_kv_heads]
        q, k, v = torch.split_with_sizes(qkv.view(qkv.shape[0], sum(counts), shape.head_dim), counts, dim=1)
        table = None if rotary is None else rotary.on_device(batch.host.max_context_len)
        rope_kv(
            q, k, v, batch.positions, table, batch.k[shape.layer], batch.v[shape.layer], batch.slots(shape.layer),
            *batch.scales(shape.layer),
        )  # fmt: skip
        return self._attention.run(shape, q)
