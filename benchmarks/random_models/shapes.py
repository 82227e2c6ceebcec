"""The sizes of known models, and the tensors that a Llama of such a size has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from serve_app.layers.rope_scaling import RopeScaling

TensorKind = Literal["matrix", "norm", "embedding"]

PLAIN_ROPE = RopeScaling()
LLAMA3_ROPE = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes. context: positions that the file promises. is_tied: the embedding is the head, too."""

    name: str
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context: int
    rope_theta: float
    rms_norm_eps: float
    rope: RopeScaling = PLAIN_ROPE
    is_tied: bool = True

    def tensors(self) -> "Iterator[Tensor]":
        """All tensors in the order of a file, by the checkpoint's names."""
        hidden, keys = self.hidden_size, self.n_kv_heads * self.head_dim
        queries = self.n_heads * self.head_dim
        yield Tensor("model.embed_tokens.weight", (self.vocab_size, hidden), "embedding")
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}."
            yield Tensor(f"{prefix}input_layernorm.weight", (hidden,), "norm")
            yield Tensor(f"{prefix}self_attn.q_proj.weight", (queries, hidden))
            yield Tensor(f"{prefix}self_attn.k_proj.weight", (keys, hidden))
            yield Tensor(f"{prefix}self_attn.v_proj.weight", (keys, hidden))
            yield Tensor(f"{prefix}self_attn.o_proj.weight", (hidden, queries))
            yield Tensor(f"{prefix}post_attention_layernorm.weight", (hidden,), "norm")
            yield Tensor(f"{prefix}mlp.gate_proj.weight", (self.intermediate_size, hidden))
            yield Tensor(f"{prefix}mlp.up_proj.weight", (self.intermediate_size, hidden))
            yield Tensor(f"{prefix}mlp.down_proj.weight", (hidden, self.intermediate_size))
        yield Tensor("model.norm.weight", (hidden,), "norm")
        if not self.is_tied:
            yield Tensor("lm_head.weight", (self.vocab_size, hidden), "embedding")

    @property
    def num_parameters(self) -> int:
        """Of all tensors."""
        return sum(tensor.size for tensor in self.tensors())

    @property
    def layer_products(self) -> int:
        """Multiplications of a token with the layers' matrices; the head's come on top where logits are wanted."""
        return sum(tensor.size for tensor in self.tensors() if tensor.kind == "matrix")

    @property
    def head_products(self) -> int:
        """Multiplications of one row of logits."""
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a model; matrices are [rows, columns] and multiply from the left."""

    name: str
    shape: tuple[int, ...]
    kind: TensorKind = "matrix"

    @property
    def size(self) -> int:
        """Number of values."""
        return self.shape[0] * (self.shape[1] if len(self.shape) == 2 else 1)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-1b", 2048, 16, 32, 8, 64, 8192, 128256, 131072, 500000.0, 1e-5, LLAMA3_ROPE),
        # Qwen2.5-0.5B's sizes without its biases, as a Llama, so that every engine can run it.
        Shape("qwen-0.5b", 896, 24, 14, 2, 64, 4864, 151936, 32768, 1000000.0, 1e-6),
        Shape("tinyllama-1.1b", 2048, 22, 32, 4, 64, 5632, 32000, 2048, 10000.0, 1e-5, is_tied=False),
        Shape("tiny", 256, 2, 4, 2, 64, 512, 1024, 2048, 500000.0, 1e-5, LLAMA3_ROPE),
    )
}
