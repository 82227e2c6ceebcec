"""What a model file costs: bytes that each token reads, and products that it needs."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from benchmarks.cpu_speed.cells import Cell
from serve_app.gguf_file import open_gguf

# Bytes of a value in the cache, by Sirocco's names; q8 has a 16-bit scale for every 32.
KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8": 34 / 32}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """weight_bytes: of all tensors that a decoded token reads whole, so without a free embedding."""

    weight_bytes: int
    layer_products: int
    head_products: int
    vocab_size: int
    kv_values: int  # of one token: keys and values of all layers

    @classmethod
    def of(cls, path: Path) -> "ModelFacts":
        """Of a GGUF of a Llama."""
        with open_gguf(path) as file:
            metadata, tensors = file.metadata, file.tensors
        is_tied = _HEAD not in tensors
        read = [t for name, t in tensors.items() if is_tied or name != _EMBEDDING]
        matrices = [prod(t.shape) for t in tensors.values() if len(t.shape) == 2 and t.name not in (_EMBEDDING, _HEAD)]
        prefix = "llama."
        n_heads, hidden = metadata[f"{prefix}attention.head_count"], metadata[f"{prefix}embedding_length"]
        head_dim = metadata.get(f"{prefix}attention.key_length", hidden // n_heads)
        n_kv_heads = metadata.get(f"{prefix}attention.head_count_kv", n_heads)
        vocab_size = tensors[_EMBEDDING].shape[0]
        return cls(
            sum(t.n_bytes for t in read),
            sum(matrices),
            vocab_size * hidden,
            vocab_size,
            2 * metadata[f"{prefix}block_count"] * n_kv_heads * head_dim,
        )

    def decode_bytes(self, depth: int, kv: str, new: int) -> float:
        """Read for one token of `new` that are decoded behind `depth` others, on average."""
        return self.weight_bytes + (depth + new / 2) * self.kv_values * KV_BYTES[kv]

    def products_per_token(self, cell: Cell) -> float:
        """Of the matrices; a prompt needs one row of the head for all its tokens. Attention's are not counted."""
        return self.layer_products + self.head_products / (cell.prompt if cell.kind == "prefill" else 1)
