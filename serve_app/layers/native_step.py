"""Records a step as a native program: each operation of `Step` says which native one does its work."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.program import Buffer, Recording
from serve_app.attention.backend import AttentionShape
from serve_app.layers.step import Activation, AngleTable, MixtureWeights, NormWeights, Routing, RoutingKind
from serve_app.quant.native import native_experts, native_parts
from serve_app.quant.weight import Weight

ACT_F32 = 0
KV_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
"""csrc/kv.h's numbers by the dtype of a KV pool; uint8 stands for q8 rows."""
_ROUTINGS: dict[RoutingKind, int] = {"softmax": 0, "sparsemixer": 1}
_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "gelu_erf": 2}


@dataclass(frozen=True, slots=True)
class NativeCache:
    """Where the native operations find keys and values: each layer's addresses, the type's number (csrc/kv.h), and by
    layer the group whose block tables it uses."""

    k: list[int]
    v: list[int]
    kv_type: int
    groups: Sequence[int]


class NativeStep:
    """See Step: rows are buffers of a recording. is_exact: no product rounds its input to 8 or 16 bits."""

    def __init__(self, recording: Recording, cache: NativeCache, *, is_exact: bool) -> None:
        self._recording = recording
        self._cache = cache
        self._is_exact = is_exact

    def embed(self, weight: Weight, factor: float = 1.0) -> Buffer:
        """See Step."""
        (part,) = native_parts(weight)
        self._recording.keep_alive(part)
        out = Buffer(weight.shape[1])
        self._recording.record([], [out], lambda program, number: program.embed(part.native, number(out), factor))
        return out

    def linear(self, x: Buffer, weight: Weight, bias: Tensor | None) -> Buffer:
        """See Step: one operation over all matrices that make up the weight, whatever their types."""
        parts = native_parts(weight)
        self._recording.keep_alive(parts)
        biases: list[int] = []
        address = self._recording.keep(bias)
        for part in parts:
            biases.append(address)
            address += 4 * part.shape[0] if address else 0
        kinds = [ACT_F32 if self._is_exact else part.native.act for part in parts]
        forms = [self._recording.form(x, kind) for kind in kinds]
        out = Buffer(weight.shape[0])
        self._recording.record(
            forms,
            [out],
            lambda program, number: program.matmul(
                [
                    (part.native, kind, number(form), bias)
                    for part, kind, form, bias in zip(parts, kinds, forms, biases, strict=True)
                ],
                number(out),
            ),
        )
        return out

    def norm(self, x: Buffer, weights: NormWeights) -> Buffer:
        """See Step."""
        return self._norm(x, None, weights)

    def add_norm(self, x: Buffer, residual: Buffer, weights: NormWeights) -> Buffer:
        """See Step."""
        return self._norm(x, residual, weights)

    def _norm(self, x: Buffer, residual: Buffer | None, weights: NormWeights) -> Buffer:
        weight, bias = self._recording.keep(weights.weight), self._recording.keep(weights.bias)
        out = Buffer(x.width)
        reads, writes = ([x], [out]) if residual is None else ([x, residual], [residual, out])
        operation = self._recording.record(
            reads,
            writes,
            lambda program, number: program.norm(
                number(x), number(residual), number(out), x.width, weight, bias, weights.is_layer_norm, weights.offset,
                weights.epsilon, operation.form_pairs(number),
            ),
            makes=out,
        )  # fmt: skip
        return out

    def head_norm(self, qkv: Buffer, first: int, count: int, weights: NormWeights) -> None:
        """See Step."""
        assert not weights.is_layer_norm
        weight, head_dim = self._recording.keep(weights.weight), weights.weight.shape[0]
        self._recording.record(
            [qkv],
            [qkv],
            lambda program, number: program.head_norm(
                number(qkv), qkv.width, first, count, head_dim, weight, weights.offset, weights.epsilon
            ),
        )

    def activate(self, x: Buffer, activation: Activation) -> Buffer:
        """See Step."""
        return self._activate(x, x.width, activation, is_gated=False)

    def gate(self, gate_up: Buffer, activation: Activation) -> Buffer:
        """See Step."""
        return self._activate(gate_up, gate_up.width // 2, activation, is_gated=True)

    def _activate(self, x: Buffer, width: int, activation: Activation, *, is_gated: bool) -> Buffer:
        out = Buffer(width)
        operation = self._recording.record(
            [x],
            [out],
            lambda program, number: program.activate(
                number(x), number(out), width, _ACTIVATIONS[activation], is_gated, operation.form_pairs(number)
            ),
            makes=out,
        )
        return out

    def experts(self, x: Buffer, weights: MixtureWeights, routing: Routing, activation: Activation) -> Buffer:
        """See Step."""
        logits = self.linear(x, weights.router, None)
        gate, up, down = (native_experts(part) for part in (weights.gate, weights.up, weights.down))
        self._recording.keep_alive((gate, up, down))
        # Both products read the same rows; every type can be multiplied with float32.
        has_one_kind = not self._is_exact and gate.native.act == up.native.act
        kind, down_kind = gate.native.act if has_one_kind else ACT_F32, ACT_F32 if self._is_exact else down.native.act
        form, out = self._recording.form(x, kind), Buffer(x.width)
        num_experts, (inner, hidden) = weights.gate.num_experts, weights.gate.shape
        self._recording.record(
            [form, logits],
            [out],
            lambda program, number: program.experts(
                (kind, number(form)), number(logits), number(out), gate.native, up.native, down.native, down_kind,
                num_experts, hidden, inner, routing.top_k, _ROUTINGS[routing.kind], routing.is_renormalised,
                routing.jitter, _ACTIVATIONS[activation],
            ),
        )  # fmt: skip
        return out

    def add_gated(self, x: Buffer, other: Buffer, gate: Buffer) -> None:
        """See Step."""
        self._recording.record(
            [x, other, gate],
            [x],
            lambda program, number: program.add_gated(number(x), number(other), number(gate), x.width),
        )

    def attention(self, qkv: Buffer, shape: AttentionShape, rotary: AngleTable | None) -> Buffer:
        """See Step."""
        cache, heads = self._cache, (shape.n_heads, shape.n_kv_heads, shape.head_dim)
        kv = (cache.groups[shape.layer], cache.k[shape.layer], cache.v[shape.layer], cache.kv_type)
        table, rotary_dim = -1, 0
        if rotary is not None:
            table, rotary_dim = self._recording.table(rotary.covering, rotary.rows_ahead), rotary.rotary_dim
        self._recording.record(
            [qkv], [qkv], lambda program, number: program.rope_kv(number(qkv), *heads, rotary_dim, table, *kv)
        )
        out = Buffer(shape.n_heads * shape.head_dim)
        self._recording.record(
            [qkv],
            [out],
            lambda program, number: program.attention(
                number(qkv), number(out), *heads, *kv, shape.scale, shape.softcap, shape.window
            ),
            mixes_rows=True,
        )
        return out

    def add(self, x: Buffer, other: Buffer) -> None:
        """See Step."""
        self._recording.record([x, other], [x], lambda program, number: program.add(number(x), number(other), x.width))

    def scale(self, x: Buffer, factor: float) -> None:
        """See Step."""
        self._recording.record([x], [x], lambda program, number: program.scale(number(x), x.width, factor))

    def softcap(self, x: Buffer, cap: float) -> None:
        """See Step."""
        self._recording.record([x], [x], lambda program, number: program.softcap(number(x), x.width, cap))

    def wanted(self, x: Buffer) -> Buffer:
        """See Step: the recording itself drops the other rows, right after the last attention."""
        return x
