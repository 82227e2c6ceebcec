"""A step by Triton's kernels between the matrix products: fewer passes over memory, fewer launches."""

import torch
from torch import Tensor

from kernels.gpu import activation as activations
from kernels.gpu import norm as norms
from kernels.gpu.kv_write import rope_kv
from serve_app.attention.backend import AttentionShape
from serve_app.layers.step import Activation, AngleTable, NormWeights
from serve_app.layers.torch_step import TorchStep


class GpuStep(TorchStep):
    """See Step: what is not here is plain torch. Nothing waits for the device.

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
