"""A step in plain torch, operation by operation: on every device, and the oracle of native programs."""

import torch
from torch import Tensor

from kernels.reference import norm as reference
from kernels.reference.routing import route
from serve_app.attention.backend import AttentionBackend, AttentionShape
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.slot_write import write_slots
from serve_app.layers.step import Activation, AngleTable, MixtureWeights, NormWeights, Routing
from serve_app.quant.experts import Experts
from serve_app.quant.weight import Weight


class TorchStep:
    """See Step: rows are tensors [T, width]."""

    def __init__(self, batch: DeviceBatch, backend: AttentionBackend) -> None:
        self._batch = batch
        self._attention = backend.plan(batch)

    def embed(self, weight: Weight, factor: float = 1.0) -> Tensor:
        """See Step."""
        rows = weight.rows(self._batch.token_ids)
        return rows if factor == 1.0 else rows * factor

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """See Step."""
        y = weight.matmul(x)
        return y if bias is None else y.add_(bias)

    def norm(self, x: Tensor, weights: NormWeights) -> Tensor:
        """See Step."""
        weight = weights.weight + weights.offset if weights.offset else weights.weight
        if weights.is_layer_norm:
            return reference.layer_norm(x, weight, weights.bias, weights.epsilon)
        return reference.rms_norm(x, weight, weights.epsilon)

    def add_norm(self, x: Tensor, residual: Tensor, weights: NormWeights) -> Tensor:
        """See Step."""
        residual += x
        return self.norm(residual, weights)

    def head_norm(self, qkv: Tensor, first: int, count: int, weights: NormWeights) -> None:
        """See Step."""
        width = weights.weight.shape[0]
        heads = qkv.view(qkv.shape[0], -1, width)[:, first : first + count]
        heads.copy_(self.norm(heads, weights))

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """See Step."""
        return reference.activate(x, activation)

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See Step."""
        return reference.gate(gate_up, activation)

    def experts(self, x: Tensor, weights: MixtureWeights, routing: Routing, activation: Activation) -> Tensor:
        """See Step."""
        logits = weights.router.matmul(x)
        chosen, factors = route(logits, routing.kind, routing.top_k, routing.is_renormalised, routing.jitter)
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            token, place = torch.where(chosen == expert)
            some = x[token]
            gate_up = [self.expert_product(some, part, expert) for part in (weights.gate, weights.up)]
            result = self.expert_product(reference.gate(torch.cat(gate_up, dim=-1), activation), weights.down, expert)
            out.index_add_(0, token, result * factors[token, place, None].to(result.dtype))
        return out

    def expert_product(self, x: Tensor, part: Experts, expert: int) -> Tensor:
        """x [n, in] of the tokens that take one expert → x W^T [n, out]."""
        return part.expert(expert).matmul(x)

    def add_gated(self, x: Tensor, other: Tensor, gate: Tensor) -> None:
        """See Step."""
        x += other * torch.sigmoid(gate)

    def attention(self, qkv: Tensor, shape: AttentionShape, rotary: AngleTable | None) -> Tensor:
        """See Step."""
        counts = [shape.n_heads, shape.n_kv_heads, shape.n_kv_heads]
        q, k, v = torch.split_with_sizes(qkv.view(qkv.shape[0], sum(counts), shape.head_dim), counts, dim=1)
        if rotary is not None:
            reference.rope(q, k, self._batch.positions, rotary.on_device(self._batch.host.max_context_len))
        write_slots(self._batch, shape.layer, k, v)
        return self._attention.run(shape, q)

    def add(self, x: Tensor, other: Tensor) -> None:
        """See Step."""
        x += other

    def scale(self, x: Tensor, factor: float) -> None:
        """See Step."""
        x *= factor

    def softcap(self, x: Tensor, cap: float) -> None:
        """See Step."""
        x.copy_(cap * torch.tanh(x.float() / cap))

    def wanted(self, x: Tensor) -> Tensor:
        """See Step."""
        return x.index_select(0, self._batch.logit_index)
