"""Decoder blocks by the way their residual runs, and the stack of them."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from serve_app.layers.embedding import Embedding, OutputHead
from serve_app.layers.norm import Norm
from serve_app.layers.step import Rows, Step

Sublayer: TypeAlias = Callable[[Rows, Step], Rows]
"""x [T, hidden] → new rows [T, hidden]: an attention or an MLP."""

Block: TypeAlias = Callable[[Rows | None, Rows, Step], Rows]
"""block(delta, residual, step) → its result. delta: the block before's result, not yet in residual (None in front of
the first), both [T, hidden]; residual is updated in place."""


class PreNormBlock:
    """A norm before attention and one before the MLP: what most families are."""

    def __init__(self, attention_norm: Norm, attention: Sublayer, mlp_norm: Norm, mlp: Sublayer) -> None:
        self._attention_norm = attention_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    def __call__(self, delta: Rows | None, residual: Rows, step: Step) -> Rows:
        """See Block."""
        x = _enter(self._attention_norm, delta, residual, step)
        x = self._mlp_norm.add(self._attention(x, step), residual, step)
        return self._mlp(x, step)


class SandwichBlock:
    """A norm before and one after both attention and MLP (Gemma 2 and 3)."""

    def __init__(
        self, before_attention: Norm, attention: Sublayer, after_attention: Norm,
        before_mlp: Norm, mlp: Sublayer, after_mlp: Norm,
    ) -> None:  # fmt: skip
        self._before_attention = before_attention
        self._attention = attention
        self._after_attention = after_attention
        self._before_mlp = before_mlp
        self._mlp = mlp
        self._after_mlp = after_mlp

    def __call__(self, delta: Rows | None, residual: Rows, step: Step) -> Rows:
        """See Block."""
        x = _enter(self._before_attention, delta, residual, step)
        x = self._after_attention(self._attention(x, step), step)
        x = self._before_mlp.add(x, residual, step)
        return self._after_mlp(self._mlp(x, step), step)


class ParallelBlock:
    """Attention and MLP side by side behind one norm (Phi-2)."""

    def __init__(self, norm: Norm, attention: Sublayer, mlp: Sublayer) -> None:
        self._norm = norm
        self._attention = attention
        self._mlp = mlp

    def __call__(self, delta: Rows | None, residual: Rows, step: Step) -> Rows:
        """See Block."""
        x = _enter(self._norm, delta, residual, step)
        y = self._attention(x, step)
        step.add(y, self._mlp(x, step))
        return y


class Decoder:
    """Embedding, blocks, last norm and head."""

    def __init__(
        self, embedding: Embedding, blocks: Sequence[Block], norm: Norm, head: OutputHead, softcap: float = 0.0
    ) -> None:
        """softcap: logits become softcap * tanh(logit / softcap), 0 = they stay."""
        self.embedding = embedding
        self.head = head
        self._blocks = blocks
        self._norm = norm
        self._softcap = softcap

    def forward(self, step: Step) -> Rows:
        """Final hidden states [T, hidden], normalised."""
        residual = self.embedding(step)
        delta = None
        for block in self._blocks:
            delta = block(delta, residual, step)
        assert delta is not None
        return self._norm.add(delta, residual, step)

    def logits(self, hidden: Rows, step: Step) -> Rows:
        """hidden [L, hidden] → [L, vocab]."""
        logits = self.head(hidden, step)
        if self._softcap:
            step.softcap(logits, self._softcap)
        return logits


def _enter(norm: Norm, delta: Rows | None, residual: Rows, step: Step) -> Rows:
    return norm(residual, step) if delta is None else norm.add(delta, residual, step)
